"""What two ranks find wrong is told by the process that started them."""

from pathlib import Path
from typing import Any

import pytest
from forked_cli import run
from tiny_config import GOOD, write_files

OF_THE_RANKS = {
    "a batch that they cannot share": (
        {"data.init_args.batch_size": 3},
        GOOD,
        "`batch_size`=3 cannot be shared by 2 ranks; use 2 or 4.",
    ),
    "more ranks than prompts": (
        {"data.init_args.batch_size": 1},
        GOOD[:1],
        "There is 1 training prompt for 2 ranks; give at least one per rank, or use fewer ranks.",
    ),
}


@pytest.mark.parametrize("case", OF_THE_RANKS)
def test_ranks(tmp_path: Path, case: str):
    changes, rows, sentence = OF_THE_RANKS[case]
    ranks: dict[str, Any] = {"trainer.devices": 2, "trainer.strategy": "ddp_fork"}
    write_files(ranks | changes, rows, folder=tmp_path)
    outcome = run(("fit", "--config=config.yaml"), tmp_path)
    assert (outcome.status, outcome.sentence) == (2, sentence)
    assert "Traceback" not in outcome.said
