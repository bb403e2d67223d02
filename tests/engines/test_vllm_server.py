"""VLLMServerEngine with real servers: the contract, training, and a server that dies."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import TEXTS, EngineContract, MakePolicy, ids, sample
from lightning.pytorch import Callback
from tiny import EvenRows, KnowsWhatFollows, make_batch, make_critic, make_trainer
from vllm_process import VLLMProcess, served_policy

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Rollouts
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import FolderTransfer, Sampling, VLLMServerEngine
from sppo_lightning.optim import GroupOptimizer

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


class Watches(Callback):
    """Keeps, of each iteration, how far the servers' log-probabilities are from the weights they claim to be of."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.versions: list[int] = []
        self.gaps: list[float] = []
        self.moved: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
        self.weights[trainer.global_step] = copy.deepcopy(module.policy.state_dict())
        [version] = set(batch.rollouts.policy_versions.tolist())
        policy = copy.deepcopy(module.policy)
        with torch.no_grad():
            newest = policy(batch.rollouts)[0]
            policy.load_state_dict(self.weights[version])
            own = policy(batch.rollouts)[0]
        self.versions.append(version)
        self.gaps.append(float((own - batch.rollouts.sampled_log_probs).abs().max()))
        self.moved.append(float((newest - own).abs().max()))


def train(engine: VLLMServerEngine, prefetch: int) -> Watches:
    optimizer = GroupOptimizer(lr=0.003, weight_decay=0.0)
    module = SPPOModule(served_policy(), make_critic(zero=True), policy_optimizer=optimizer)
    texts = ["1 + 2 =", "8 8", "4 ; 4", "q r s"]
    batches = [make_batch(module.policy, texts, first_row=4 * i) for i in range(5)]
    watches = Watches()
    generation = RolloutGeneration(
        Sampling(max_new_tokens=24, samples_per_prompt=4), engine=engine, prefetch=prefetch
    )
    make_trainer(generation, EvenRows(), watches).fit(module, KnowsWhatFollows(batches))  # type: ignore[arg-type]
    return watches


@pytest.mark.parametrize("prefetch", [0, 1])
def test_responses_come_from_the_updated_weights(engine: VLLMServerEngine, prefetch: int):
    watches = train(engine, prefetch)
    assert watches.versions == ([0, 1, 2, 3, 4] if prefetch == 0 else [0, 0, 1, 2, 3])
    assert max(watches.gaps) < 1e-4
    if prefetch:  # the weights before would have been seen
        assert min(watches.moved[1:]) > 1e-3


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
