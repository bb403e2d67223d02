"""VLLMServerEngine with real servers: the contract, training, and a server that dies."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from contract import EngineContract, MakePolicy
from vllm_process import VLLMProcess, served_policy

from sppo_lightning.engines import FolderTransfer, VLLMServerEngine

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "model"


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[VLLMProcess]]:
    started = [VLLMProcess(folder), VLLMProcess(folder)]
    for server in started:
        server.wait()
    yield started
    for server in started:
        server.kill()


@pytest.fixture
def engine(servers: list[VLLMProcess], folder: Path) -> VLLMServerEngine:
    return VLLMServerEngine([server.url for server in servers], FolderTransfer(str(folder)))


class TestVLLMServerEngine(EngineContract):
    atol = 1e-4

    @pytest.fixture
    def policy_of(self) -> MakePolicy:
        return served_policy
