"""VLLMEngine with the real vLLM in this process: the contract, training, and a trainer that is left as it was."""

from collections.abc import Iterator

import pytest
from contract import EngineContract, MakePolicy
from vllm_process import served_policy

from sppo_lightning.engines import VLLMEngine

pytestmark = pytest.mark.vllm
SETTINGS = {"enforce_eager": True, "max_num_seqs": 64, "kv_cache_memory_bytes": 2**28}


@pytest.fixture(scope="module")
def started() -> Iterator[VLLMEngine]:
    engine = VLLMEngine(max_model_len=512, vllm=SETTINGS)
    yield engine
    engine.close()


class TestVLLMEngine(EngineContract):
    atol = 1e-4

    @pytest.fixture
    def engine(self, started: VLLMEngine) -> VLLMEngine:
        return started

    @pytest.fixture
    def policy_of(self) -> MakePolicy:
        return served_policy
