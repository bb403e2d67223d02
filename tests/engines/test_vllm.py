"""VLLMEngine with the real vLLM in this process: the contract, training, and a trainer that is left as it was."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contract import TEXTS, EngineContract, MakePolicy, ids, sample
from forked import on_ranks
from test_docs import callbacks_built
from tiny import make_batch
from training import Watches, check_versions, check_watched, train, train_sharded
from vllm_process import served_policy

from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import Sampling, VLLMEngine
from sppo_lightning.errors import InputError

pytestmark = pytest.mark.vllm


def make_engine() -> VLLMEngine:
    """What a CPU needs is given besides."""
    few = {"enforce_eager": True, "max_num_seqs": 64, "kv_cache_memory_bytes": 2**28}
    return VLLMEngine(max_model_len=512, vllm=few)


@pytest.fixture(scope="class")  # one at a time: what vLLM keeps for the process is not for two
def started() -> Iterator[VLLMEngine]:
    engine = make_engine()
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


@pytest.mark.parametrize("prefetch", [0, 1])
def test_responses_come_from_the_updated_weights(prefetch: int):
    check_versions(make_engine(), prefetch, 1e-4)


class WrittenDown(Watches):
    """What a rank watches stays with the rank, unless it is written."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: Any, module: Any) -> None:
        found = {"versions": self.versions, "gap": max(self.gaps)}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


def test_every_rank_has_its_own(tmp_path: Path):
    train(make_engine(), watches=WrittenDown(tmp_path), devices=2, strategy="ddp_spawn")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["versions"] == [0, 1, 2, 3, 4]
        assert found["gap"] < 1e-4


def test_every_rank_has_all_of_a_sharded_policy(tmp_path: Path):
    for watches in on_ranks(2, tmp_path, train_sharded, make_engine, start_method="spawn"):
        check_watched(watches, 0, 1e-4)


def test_weights_are_the_engines_own(started: VLLMEngine):
    policy = served_policy()
    expected = ids(sample(started, policy))
    policy.load_state_dict(served_policy(5).state_dict())
    assert ids(started.generate(make_batch(policy, TEXTS), Sampling(max_new_tokens=12))) == expected


def test_a_reader_who_stops_leaves_nothing_behind(started: VLLMEngine):
    policy = served_policy()
    expected = ids(sample(started, policy))
    stream = started.stream(make_batch(policy, TEXTS), Sampling(max_new_tokens=100, samples_per_prompt=4))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert ids(sample(started, policy)) == expected


def test_a_request_that_is_too_long(started: VLLMEngine):
    policy = served_policy()
    with pytest.raises(InputError, match="^A prompt of 8 tokens and `max_new_tokens`=508 are more than `max_model"):
        sample(started, policy, max_new_tokens=508)
    assert len(sample(started, policy)) == len(TEXTS)


def surroundings() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "NumPy's": str(np.random.get_state()),
        "Python's": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "group": dist.group.WORLD if dist.is_initialized() else None,
    }


@pytest.mark.parametrize("grouped", [False, True], ids=["no process group", "the trainer's process group"])
def test_the_process_is_left_as_it_was(grouped: bool):
    engine, policy = make_engine(), served_policy()
    if grouped:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = surroundings()
        first = ids(sample(engine, policy))
        assert surroundings() | {"group": None} == before | {"group": None}
        engine.close()
        assert surroundings() == before
        assert ids(sample(engine, policy)) == first  # it comes back
        torch.set_num_threads(before["threads"] + 1)
        assert torch.get_num_threads() == before["threads"] + 1
        torch.set_num_threads(before["threads"])
    finally:
        engine.close()
        if grouped:
            dist.all_reduce(torch.ones(1))
            dist.destroy_process_group()


def test_the_documented_settings_build_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    [generation] = [
        callback
        for callback in callbacks_built("VLLMEngine", monkeypatch, tmp_path, "docs/vllm.md")
        if isinstance(callback, RolloutGeneration)
    ]
    expected = {"gpu_memory_utilization": 0.3, "max_model_len": 4096, "max_num_seqs": 256}
    assert generation.engine.arguments == expected


def test_a_request_that_vllm_refuses_leaves_nothing_behind(started: VLLMEngine):
    policy = served_policy()
    started.update_weights(policy, 0)
    batch = make_batch(policy, TEXTS)
    batch.token_ids[3] = [10**6]  # no token of the vocabulary
    with pytest.raises(
        InputError, match="^vLLM refuses the request for prompt 3 of the batch: .* out of vocabulary"
    ):
        list(started.stream(batch, Sampling(max_new_tokens=4)))
    assert not started._llm.llm_engine.has_unfinished_requests()


def test_a_vllm_that_is_too_old(monkeypatch: pytest.MonkeyPatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    with pytest.raises(InputError, match="needs vLLM 0.32 or newer, and 0.31.2 is installed"):
        make_engine().update_weights(served_policy(), 0)


def test_settings_that_vllm_does_not_take():
    policy, engine = served_policy(), make_engine()
    wrong = VLLMEngine(vllm={**engine.arguments, "max_num_sequences": 3})
    before = surroundings()
    with pytest.raises(
        InputError, match="^vLLM does not start with the settings of VLLMEngine, .*max_num_sequences"
    ):
        wrong.update_weights(policy, 0)
    assert surroundings() == before
    assert len(sample(engine, policy)) == len(TEXTS)
    engine.close()
