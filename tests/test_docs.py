"""The Python of the documentation runs as it stands, and does what is said beside it."""

import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from by_hand import ByHand, assert_equal, run
from given import outcomes
from tiny_config import EXACT, ROLLOUT, write_files

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import (
    CodeVerifier,
    CollapseMonitor,
    CompletionLog,
    ExactMatch,
    FormatVerifier,
    HackingMonitor,
    LengthPenalty,
    RewardModelVerifier,
    SearchHopeless,
    StepQuality,
)
from sppo_lightning.cli import command_line, main
from sppo_lightning.collapse import CollapseLimits
from sppo_lightning.engines import TreeSearchEngine
from sppo_lightning.found_losses import Demonstrations
from sppo_lightning.verification.drift import Limits

ROOT = Path(__file__).resolve().parents[1]


def block_of(page: str, language: str, marker: str) -> str:
    """The page's one block of a language with `marker` in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if marker in block]
    return block


def names_in(page: str, marker: str) -> dict[str, Any]:
    """What the page's Python block with `marker` defines."""
    names: dict[str, Any] = {}
    exec(block_of(page, "python", marker), names)
    return names


def test_an_advantage_of_ones_own():
    advantage = names_in("docs/algorithms.md", "HalfBaseline")["HalfBaseline"]()
    assert advantage(outcomes([(0, 1.0, 0.0), (1, 0.0, 0.0)])).tolist() == [0.75, -0.25]
    module, _ = run(advantage=advantage)
    hand = ByHand()
    for row in hand.rows:
        row["V"] = row["V"] / 2
    policy, _ = hand.policy_losses(hand.rows)
    policy.backward()
    ours = {name: g for name, g in module.gradients[0].items() if name.startswith("policy.")}
    assert_equal(ours, {f"policy.{name}": p.grad for name, p in hand.policy.named_parameters()})


@pytest.mark.parametrize(("page", "name"), [("README.md", "CountsVowels"), ("docs/verifiers.md", "Brief")])
def test_a_verifier_of_ones_own(page: str, name: str):
    verifier = names_in(page, f"class {name}")[name]()
    scores = verifier.score([Prompt("", "", "any", 0)] * 2, ["aeiou", "xyz" * 100])
    assert scores == ([1.0, 0.0] if name == "CountsVowels" else [0.975, 0.0])


def callbacks_built(
    marker: str, monkeypatch: pytest.MonkeyPatch, folder: Path, page: str = "docs/verifiers.md"
) -> list[Any]:
    """The callbacks of the page's YAML block with `marker`, built by the command line."""
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(folder)
    write_files({"trainer.callbacks": yaml.safe_load(block_of(page, "yaml", marker))["callbacks"]})
    return command_line(["--config", "config.yaml"], run=False).trainer.callbacks


def only(kind: type, callbacks: list[Any]) -> Any:
    (found,) = [callback for callback in callbacks if isinstance(callback, kind)]
    return found


def test_the_pages_reward_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    learned = only(RewardModelVerifier, callbacks_built("RewardModelVerifier", monkeypatch, tmp_path))
    assert (learned.role, learned.squash, learned.weight, learned.dtype) == ("shaping", False, 0.05, "bfloat16")


def test_the_pages_form_length_and_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    callbacks = callbacks_built("FormatVerifier", monkeypatch, tmp_path)
    form = only(FormatVerifier, callbacks)
    responses = [
        r"<think>so</think>\boxed{5}",
        r"\boxed{5}",
        r"<think>as an AI</think>\boxed{5}",
        "<think>so</think>5",
    ]
    assert form.score([Prompt("", "", "any", 0)] * 4, responses) == [1.0, 0.0, 0.0, 0.0]
    penalty = only(LengthPenalty, callbacks)
    limit = penalty.max_response_tokens
    assert [penalty.curve.value(n, limit, False) for n in (7168, 7680, 8192)] == [0.0, -0.5, -1.0]
    steps = only(StepQuality, callbacks)
    assert (steps.weight, steps.role, steps.only_if_correct) == (0.2, "shaping", True)


def test_a_step_scorer_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "my_verifiers.py").write_text(block_of("docs/verifiers.md", "python", "class NoGuessing"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_verifiers", raising=False)
    steps = only(StepQuality, callbacks_built("my_verifiers.NoGuessing", monkeypatch, tmp_path))
    response = "I guess so.\n1 + 1 = 2\n1 + 2 = 4\nDone."
    assert steps.score([Prompt("", "", "any", 0)], [response]) == [2.5 / 4]


def test_the_pages_monitor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monitor = only(
        HackingMonitor, callbacks_built("name: strict", monkeypatch, tmp_path, page="docs/reward-hacking.md")
    )
    (check,) = monitor.checks
    assert isinstance(check, ExactMatch)
    assert check.name == "strict"
    assert monitor.limits == Limits(spam_growth=None)
    assert monitor.stop_on_alarm


def test_the_pages_collapse_monitor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    page = "docs/when-it-goes-wrong.md"
    monitor = only(CollapseMonitor, callbacks_built("CollapseMonitor", monkeypatch, tmp_path, page=page))
    assert monitor.collapse.limits == CollapseLimits(length_growth=None)
    windows = {metric: series.window for metric, series in monitor.collapse.series.items()}
    default = {metric: series.window for metric, series in CollapseMonitor().collapse.series.items()}
    assert windows == default
    assert (windows["reward/mean"], windows["critic/brier_skill"], windows["policy/entropy"]) == (5, 50, 10)
    rows = re.findall(r"`(\w+)`[^|]* \| ([0-9.]+) \|$", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert {name: float(value) for name, value in rows} == vars(CollapseLimits())


def test_the_pages_hidden_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    callbacks = callbacks_built("cases: hidden", monkeypatch, tmp_path, page="docs/reward-hacking.md")
    (check,) = only(HackingMonitor, callbacks).checks
    assert (check.name, check.cases) == ("hidden_cases", "hidden")
    assert check.hidden_share == only(CodeVerifier, callbacks).hidden_share == 0.3


def test_the_pages_routes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "my_verifiers.py").write_text(block_of("docs/verifiers.md", "python", "class Brief"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_verifiers", raising=False)
    callbacks = callbacks_built("applies_to", monkeypatch, tmp_path)
    (brief,) = [each for each in callbacks if type(each).__name__ == "Brief"]
    assert brief.only_if_correct
    assert only(CodeVerifier, callbacks).applies_to == ("livecode",)


def test_the_pages_completions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    callbacks = callbacks_built("CompletionLog", monkeypatch, tmp_path, page="docs/exports.md")
    log, default = only(CompletionLog, callbacks), CompletionLog()
    assert [log.every_n_iterations, log.max_iterations, log.max_bytes] == [
        default.every_n_iterations,
        default.max_iterations,
        default.max_bytes,
    ]
    keeper = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    keeper["init_args"] = {"dirpath": "runs/my/checkpoints", "save_last": True}
    written = {"class_path": "sppo_lightning.callbacks.CompletionLog", "init_args": {"path": "runs/my/rollouts"}}
    callbacks = [ROLLOUT, EXACT, written, keeper]
    write_files({"trainer.callbacks": callbacks, "trainer.enable_checkpointing": True})
    main(["fit", "--config", "config.yaml"])
    main(["export", "--ckpt", "runs/my/checkpoints/last.ckpt", "--to", "runs/my/model"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    columns = set(re.findall(r"^\| (`[\w/<>`, ]+) \|", (ROOT / "docs/exports.md").read_text(), flags=re.MULTILINE))
    named = {name.strip("`").replace("<verifier>", "exact_match") for row in columns for name in row.split(", ")}
    rollouts = names_in("docs/exports.md", "load_dataset")["rollouts"]
    assert len(rollouts) == 4
    assert set(rollouts.column_names) <= named
    models = names_in("docs/exports.md", "AutoModelForCausalLM")
    assert models["critic"].config.id2label == {0: "solvable"}
    Path("config.yaml").unlink()
    names_in("docs/exports.md", 'checkpoint["config"]')
    main(["validate", "--config", "config.yaml", "--data.validation={few: train.jsonl}"])


def test_the_monitors_defaults_are_those_of_the_table():
    rows = re.findall(
        r"\| `(\w+)`[^|]*\| ([0-9.]+) \|$", (ROOT / "docs/reward-hacking.md").read_text(), flags=re.MULTILINE
    )
    assert {name: float(value) for name, value in rows} == vars(Limits())


def test_the_pages_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    stage = only(SearchHopeless, callbacks_built("SearchHopeless", monkeypatch, tmp_path, page="docs/search.md"))
    assert isinstance(stage.search, TreeSearchEngine)
    assert (stage.search.engine, stage.search.step_end, stage.below) == (None, ("\n\n",), 0.05)
    assert isinstance(stage.loss, Demonstrations)
