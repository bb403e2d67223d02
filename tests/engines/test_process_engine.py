"""An engine in a process of its own keeps the contract, and says what goes wrong there."""

from collections.abc import Iterator

import pytest
from contract import EngineContract

from sppo_lightning.engines import Engine, HFEngine, ProcessEngine


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = ProcessEngine(HFEngine())
    yield engine
    engine.close()


class TestProcessEngine(EngineContract):
    pass
