"""The ways to start several processes that docs/scaling.md gives: they learn what one process learns."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_config import CONFIG, EXACT, ROLLOUT, write_files

ROOT = Path(__file__).parents[1]
FIT = ["sppo_lightning", "fit", "--config", "config.yaml", "--trainer.max_steps", "2"]
EXPORT = {"class_path": "sppo_lightning.callbacks.HFExport", "init_args": {"path": "model"}}

pytestmark = pytest.mark.slow  # each process imports everything


def learned(folder: Path, *processes: "subprocess.Popen[str]") -> dict[str, torch.Tensor]:
    """The policy's weights, when all have ended well."""
    for process in processes:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    return load_file(folder / "model/model.safetensors")


def start(folder: Path, *words: str, **environment: str) -> "subprocess.Popen[str]":
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the config and its files."""
    folder = tmp_path_factory.mktemp("run")
    rate = {"model.init_args": {**CONFIG["model"]["init_args"], "policy_optimizer": {"lr": 0.01}}}
    rows = [{"prompt": f"{a} {b}", "answer": "a"} for a in "abcd" for b in "ab"]
    with contextlib.chdir(folder):
        write_files({**rate, "trainer.callbacks": [ROLLOUT, EXACT, EXPORT]}, rows)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, torch.Tensor]:
    """What one process learns."""
    return learned(folder, start(folder, *FIT))


@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_torchrun(folder: Path, alone: dict[str, torch.Tensor], overlay: str) -> None:
    strategy = ["--trainer.strategy", "ddp"] if overlay == "ddp" else ["--config", str(ROOT / "configs/fsdp.yaml")]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    found = learned(folder, start(folder, *torchrun, *FIT, *strategy, "--trainer.devices", "2"))
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0.0)


def test_slurm(folder: Path, alone: dict[str, torch.Tensor]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "sppo", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [*FIT, "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    tasks = [start(folder, *words, **job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]
    torch.testing.assert_close(learned(folder, *tasks), alone, atol=1e-5, rtol=0.0)
