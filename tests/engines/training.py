"""A few iterations with an engine, and how far its log-probabilities are from the weights that it claims."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import EvenRows, KnowsWhatFollows, make_batch, make_critic, make_trainer
from vllm_process import served_policy

from sppo_lightning import SPPOModule
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import Engine, Sampling
from sppo_lightning.engines.whole_copy import WholeCopy
from sppo_lightning.optim import GroupOptimizer


class Watches(Callback):
    """Keeps, of each iteration, how far the engine's log-probabilities are from the weights they claim to be of."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.versions: list[int] = []
        self.gaps: list[float] = []
        self.moved: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
        whole = WholeCopy(module.policy)
        whole.follow()
        policy = whole.policy
        self.weights[trainer.global_step] = copy.deepcopy(policy.state_dict())
        [version] = set(batch.rollouts.policy_versions.tolist())
        with torch.no_grad():
            newest = policy(batch.rollouts)[0]
            policy.load_state_dict(self.weights[version])
            own = policy(batch.rollouts)[0]
        self.versions.append(version)
        self.gaps.append(float((own - batch.rollouts.sampled_log_probs).abs().max()))
        self.moved.append(float((newest - own).abs().max()))


def train(engine: Engine, prefetch: int = 0, watches: Watches | None = None, **settings: Any) -> Watches:
    optimizer = GroupOptimizer(lr=0.003, weight_decay=0.0)
    module = SPPOModule(served_policy(), make_critic(zero=True), policy_optimizer=optimizer)
    texts = ["1 + 2 =", "8 8", "4 ; 4", "q r s"]
    batches = [make_batch(module.policy, texts, first_row=4 * i) for i in range(5)]
    watches = watches or Watches()
    generation = RolloutGeneration(
        Sampling(max_new_tokens=24, samples_per_prompt=4), engine=engine, prefetch=prefetch
    )
    make_trainer(generation, EvenRows(), watches, **settings).fit(module, KnowsWhatFollows(batches))  # type: ignore[arg-type]
    return watches


def check_versions(engine: Engine, prefetch: int, gap: float) -> None:
    """Responses come from the weights that they claim to be of: the newest, or one iteration older ones."""
    check_watched(train(engine, prefetch), prefetch, gap)


def check_watched(watches: Watches, prefetch: int, gap: float) -> None:
    """The same of what was watched."""
    assert watches.versions == ([0, 1, 2, 3, 4] if prefetch == 0 else [0, 0, 1, 2, 3])
    assert max(watches.gaps) < gap
    if prefetch:  # the weights before would have been seen
        assert min(watches.moved[1:]) > 1e-3


def train_sharded(make_engine: Callable[[], Engine], prefetch: int = 0) -> Watches:
    """Training on one of two ranks that `forked.on_ranks` has started, each of which holds a part of the policy."""
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    watches = train(make_engine(), prefetch, devices=2, strategy=strategy)
    seen = Watches()  # the one that has run holds on to its module, which cannot be sent
    seen.versions, seen.gaps, seen.moved = watches.versions, watches.gaps, watches.moved
    return seen
