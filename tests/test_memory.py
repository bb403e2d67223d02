import sys
from pathlib import Path

import pytest
import torch
from tiny import Recites, TableVerifier, loader, make_batch, make_critic, make_policy, make_trainer

from sppo_lightning import SPPOModule
from sppo_lightning.memory import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's own account")
def test_the_peak_is_the_systems_own():
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert peak_memory()["peak_mb"] == pytest.approx(kib / 1024, rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_gpu():
    block = torch.ones(2**24, device="cuda")  # 64 MB
    peaks = peak_memory()
    assert peaks["gpu_peak_mb"] == torch.cuda.max_memory_allocated() / 2**20 >= 64
    assert peaks["gpu_reserved_mb"] >= peaks["gpu_peak_mb"]
    del block
    assert peak_memory()["gpu_peak_mb"] == peaks["gpu_peak_mb"]


def test_every_iteration_logs_it():
    policy = make_policy()
    before = peak_memory()["peak_mb"]
    trainer = make_trainer(Recites({"1 +": ["3 <eos>"]}), TableVerifier({("1 +", "3"): 1.0}))
    trainer.fit(SPPOModule(policy, make_critic()), loader(make_batch(policy, ["1 +"])))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("memory/")}
    assert set(logged) == {f"memory/{name}" for name in peak_memory()}
    assert before - 0.01 <= logged["memory/peak_mb"] <= peak_memory()["peak_mb"] + 0.01
