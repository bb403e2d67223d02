"""A rank that the others wait for in vain is named, within the time that they wait."""

import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from chain_run import run
from forked import on_ranks
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from sppo_lightning.phases import Watch, phase

SECONDS = 4  # that ranks wait for each other


class Absent(Callback):
    """In the second iteration, rank 1 is not there for the update."""

    def __init__(self, dies: bool) -> None:
        self.dies = dies

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step and trainer.global_rank == 1:
            if self.dies:
                os._exit(0)  # which is no failure to those who have started it
            time.sleep(60)


def work(dies: bool) -> None:
    run(2, 0, None, 6, Absent(dies), strategy=DDPStrategy(timeout=timedelta(seconds=SECONDS)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dies", [False, True], ids=["stays away", "dies"])
def test_the_missing_rank_and_its_phase_are_named(tmp_path: Path, dies: bool) -> None:
    start = time.monotonic()
    with pytest.raises(mp.ProcessRaisedException) as failure:
        on_ranks(2, tmp_path, work, dies)
    assert time.monotonic() - start < 10 * SECONDS
    where = r"rank 0 is in `update` for \d+ s, rank 1 is behind `verify` \(Parity\) for \d+ s"
    assert re.search(rf"RuntimeError: The ranks have not met in `update`: {where}\.", str(failure.value))


def watched() -> list[str]:
    dist.init_process_group("gloo")
    said: list[str] = []
    with phase("`rollout`"):
        pass
    watch = Watch(1.0, said.append)
    time.sleep(0.3 if dist.get_rank() else 1.6)  # longer than ranks wait
    with phase("`verify`"):
        time.sleep(1.6 if dist.get_rank() else 0.3)
    watch.close()
    dist.barrier()
    dist.destroy_process_group()
    return said


def test_where_ranks_are_is_said_before_they_stop_waiting(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, watched)
    assert len(first) == len(second) == 1  # once, however long it lasts
    for sentence in (*first, *second):
        assert re.fullmatch(r".*: rank 0 is behind `rollout` for \d s, rank 1 is in `verify` for \d s\.", sentence)


def test_one_process_meets_nobody() -> None:
    with pytest.raises(RuntimeError, match="^it timed out$"), phase("`verify`"):
        raise RuntimeError("it timed out")
