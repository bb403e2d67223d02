"""VLLMServerEngine with real servers: the contract, training, and a server that dies."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from contract import TEXTS, EngineContract, MakePolicy, ids, sample
from forked import on_ranks
from tiny import make_batch
from training import check_versions, check_watched, train_sharded
from vllm_process import VLLMProcess, served_policy

from sppo_lightning.batch import Rollouts
from sppo_lightning.engines import FolderTransfer, Sampling, VLLMServerEngine

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "model"


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[list[VLLMProcess]]:
    started = [VLLMProcess(FolderTransfer(str(folder)), folder.parent) for _ in range(2)]
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


@pytest.mark.parametrize("prefetch", [0, 1])
def test_responses_come_from_the_updated_weights(engine: VLLMServerEngine, prefetch: int):
    check_versions(engine, prefetch, 1e-4)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_sharded_policy_is_sent_whole(tmp_path: Path, servers: list[VLLMProcess], folder: Path, prefetch: int):
    make_engine = partial(VLLMServerEngine, [server.url for server in servers], FolderTransfer(str(folder)))
    # an engine of another test may have made a process group here, which a fork would take along
    for watches in on_ranks(2, tmp_path, train_sharded, make_engine, prefetch, start_method="spawn"):
        check_watched(watches, prefetch, 1e-4)


def test_weights_that_the_servers_were_not_sent_are_noticed(engine: VLLMServerEngine):
    policy = served_policy()
    engine.update_weights(policy, 0)
    engine.servers[1].post("/update_weight_version", {"new_version": "of another run"})
    with pytest.raises(RuntimeError, match="sampled from the weights .*of another run.*, where '0.1' are the"):
        sample_again(engine)


def test_a_server_that_dies_is_left_out(servers: list[VLLMProcess], engine: VLLMServerEngine):
    policy = served_policy()
    expected = sample(engine, policy, samples_per_prompt=4)
    servers[0].kill()
    with pytest.warns(UserWarning, match=f"A vLLM server is left out from now on, 1 go on: {servers[0].url}"):
        rollouts = sample_again(engine)
    assert ids(rollouts) == ids(expected)
    other = served_policy(5)
    after = sample(engine, other)
    with torch.no_grad():
        torch.testing.assert_close(after.sampled_log_probs, other(after)[0], atol=1e-4, rtol=1e-4)
    servers[1].kill()
    with pytest.raises(RuntimeError, match="^No vLLM server is left: "):
        engine.update_weights(policy, 9)


def sample_again(engine: VLLMServerEngine) -> Rollouts:
    """With the weights that the servers have, or are thought to have."""
    batch = make_batch(engine.policy, TEXTS)
    return engine.generate(batch, Sampling(max_new_tokens=12, samples_per_prompt=4))
