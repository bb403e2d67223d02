import os

import pytest
import torch
from lightning.pytorch import seed_everything


@pytest.fixture(autouse=True)
def _one_seed_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers whatever ran before, and no threads that spin on shared cores."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))  # restored after the test
    seed_everything(0, verbose=False)
    torch.set_num_threads(1)
