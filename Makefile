# Two commands do everything: `make quickstart` and `make test`. Both may be run again at any time.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= $(VENV)-vllm
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_REQUIRE_VIRTUALENV = 1

.PHONY: help quickstart test slow sandbox vllm lint wheel clean install
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install, warm-start a tiny model, improve it with SPPO, show the result (about 7 minutes)"
	@echo "make test         install and run the tests (about 5 minutes)"
	@echo "make slow         the tests that take longer"
	@echo "make sandbox      the tests that run submitted code; they need bubblewrap (Debian: apt install bubblewrap)"
	@echo "make vllm         the tests with vLLM, in an environment of their own ($(VLLM_VENV))"
	@echo "make lint         ruff and mypy"
	@echo "make wheel        build the wheel and the source archive into dist/"

quickstart: install
	@echo "==> warm start, SPPO and its control on the embedded task"
	$(RUN) benchmarks/quickstart.py

test: install
	@echo "==> tests"
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not sandbox and not vllm" -n 2

slow: install
	@echo "==> slow tests"
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow -n 2

sandbox: install
	@command -v bwrap >/dev/null || { echo "These tests need bubblewrap; install it (Debian and Ubuntu: apt install bubblewrap)."; exit 1; }
	@echo "==> attacks on the sandbox"
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m sandbox

vllm: $(VLLM_VENV)/.installed
	@echo "==> tests with vLLM"
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m vllm

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

wheel: install
	$(RUN) -m build --outdir dist .

install: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON); name one from 3.11 on: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "$(PYTHON) is Python " + sys.version.split()[0] + "; sppo-lightning needs 3.11 or newer: make PYTHON=python3.11")'
	@echo "==> environment in $(VENV)"
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || (echo "$(PYTHON) has no venv module; install it (Debian: python3-venv)."; exit 1)
	@echo "==> installing torch, then the rest (some minutes the first time)"
	@start=$$(date +%s); \
	$(RUN) -m pip install --quiet --constraint constraints.txt torch && \
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]" && \
	echo "    installed in $$(($$(date +%s) - start)) s"
	@touch $(STAMP)

$(VLLM_VENV)/.installed: requirements-vllm.txt pyproject.toml
	@echo "==> environment with vLLM in $(VLLM_VENV) (some minutes the first time)"
	@$(VLLM_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --constraint requirements-vllm.txt torch
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	@$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $(VLLM_VENV)/.installed

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info
