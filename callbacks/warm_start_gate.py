"""The gate between the warm start and reinforcement: it keeps a run from starting on nothing but zeros."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks.rollout_generation import RolloutGeneration
from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import wilson_interval
from sppo_lightning.module import SPPOModule
from sppo_lightning.phases import phase
from sppo_lightning.pipeline import Stage
from sppo_lightning.ranks import gather_objects
from sppo_lightning.resuming import starts_afresh

_MOSTLY = 0.5  # share of the responses; where more are cut off, that is what is wrong


@dataclass(frozen=True)
class Tried:
    """What came of the responses that were tried, on one rank or on all."""

    reward: float = 0.0  # the sum over those with a verdict
    judged: int = 0  # responses with a verdict
    responses: int = 0
    truncated: int = 0  # responses that were cut off
    prompts: int = 0

    def __add__(self, other: Tried) -> Tried:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Tried(*(a + b for a, b in pairs))

    @property
    def pass_rate(self) -> float:
        """Mean reward of the responses with a verdict; 0 where there is none."""
        return self.reward / max(self.judged, 1)

    @property
    def truncated_fraction(self) -> float:
        """Share of the responses that were cut off."""
        return self.truncated / max(self.responses, 1)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the pass rate; responses to one prompt may all fail together, so prompts are counted."""
        return wilson_interval(self.pass_rate, self.prompts)

    def __str__(self) -> str:
        low, high = self.interval()
        silent = self.responses - self.judged
        return (
            f"{self.pass_rate:.1%} (95 % interval {low:.1%} to {high:.1%}; {self.responses} responses to "
            f"{self.prompts} training prompts, {self.truncated_fraction:.1%} of them cut off"
            f"{f', {silent} without a verdict' if silent else ''})"
        )


class WarmStartGate(Callback):
    """Refuses to start where the policy solves too few of the training prompts for reinforcement to begin.

    Before the first iteration of a fresh `fit`, some training prompts, drawn at random, are sampled as in training
    and scored by the run's outcome verifiers. A run below `min_pass_rate` ends there, with figures; one above goes
    on as if nothing had been tried: the same weights, random numbers, prompts and responses. A resumed run is not
    tried again.

    Logs `warm_start/pass_rate` and `warm_start/truncated_fraction`, at step 0.

    Args:
        min_pass_rate: The run is refused below this mean reward, above 0 and at most 1.
        prompts: How many training prompts are tried, over all ranks; all where there are fewer.
        samples_per_prompt: Responses to each.
    """

    def __init__(self, min_pass_rate: float = 0.05, prompts: int = 128, samples_per_prompt: int = 1) -> None:
        if not 0 < min_pass_rate <= 1:
            raise InputError(
                f"`WarmStartGate.min_pass_rate`={min_pass_rate} keeps nothing back, or everything; use a number "
                "above 0 and at most 1, or remove WarmStartGate."
            )
        for name, value in {"prompts": prompts, "samples_per_prompt": samples_per_prompt}.items():
            if value < 1:
                raise InputError(f"`WarmStartGate.{name}`={value} tries nothing; use 1 or more.")
        self.min_pass_rate = min_pass_rate
        self.prompts = prompts
        self.samples_per_prompt = samples_per_prompt

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out how responses are sampled and scored."""
        if stage != "fit":
            return
        if not isinstance(pl_module, SPPOModule):
            raise InputError(
                f"`trainer.callbacks` lists WarmStartGate, which stands before reinforcement, and `model` is "
                f"{type(pl_module).__name__}; remove WarmStartGate."
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        samplers = [callback for callback in callbacks if isinstance(callback, RolloutGeneration)]
        if not samplers:
            raise InputError(
                "`trainer.callbacks` lists WarmStartGate, which samples as RolloutGeneration does, without it; "
                "list it too, or remove WarmStartGate."
            )
        self._generation = samplers[0]
        self._judges = [each for each in callbacks if isinstance(each, Stage) and "scores" in each.provides]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the prompts, and refuse to go on from below `min_pass_rate`.

        Raises:
            InputError: Where the pass rate is below `min_pass_rate`, on all ranks alike.
        """
        if not starts_afresh(trainer):
            return
        loader: Any = trainer.train_dataloader
        if not hasattr(loader, "at_random"):
            raise InputError(
                f"WarmStartGate draws training prompts from PromptDataModule, and the data are a "
                f"{type(loader).__name__}; use sppo_lightning.data.PromptDataModule, or remove WarmStartGate."
            )
        with isolate_rng(), phase("the gate (WarmStartGate)"):
            own = self._try(loader.at_random(self.prompts), trainer, pl_module)
            tried = sum(gather_objects(own), start=Tried())
        metrics = {"pass_rate": tried.pass_rate, "truncated_fraction": tried.truncated_fraction}
        named = {f"warm_start/{name}": torch.tensor(value) for name, value in metrics.items()}
        trainer.callback_metrics.update(named)
        trainer._logger_connector.log_metrics(named)
        if tried.pass_rate < self.min_pass_rate:
            raise InputError(self._refusal(tried))
        rank_zero_info(f"WarmStartGate: the policy starts with a pass rate of {tried}.")

    @torch.no_grad()
    def _try(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> Tried:
        """Sample and score this rank's share of the prompts, as the stages do; not counted as theirs."""
        sampling = dataclasses.replace(self._generation.sampling, samples_per_prompt=self.samples_per_prompt)
        batch.rollouts = self._generation.probe(batch, sampling, trainer, module)
        for judge in self._judges:
            judge.begin()
            judge.process(batch, trainer, module)
            judge.begin()
        rewards = batch.rollouts.rewards
        verdicts = ~rewards.isnan()
        cut_off = batch.rollouts.finish_reasons.count("length")
        reward = float(rewards[verdicts].double().sum())
        return Tried(reward, int(verdicts.sum()), len(rewards), cut_off, len(batch))

    def _refusal(self, tried: Tried) -> str:
        ways = [
            "warm-start it longer and point `model.policy.pretrained` to the result",
            "give easier prompts",
            "lower the floor",
        ]
        if tried.truncated_fraction > _MOSTLY:
            limit = self._generation.sampling.max_new_tokens
            ways.insert(0, f"raise `sampling.max_new_tokens`={limit}, at which most responses are cut off")
        if tried.interval()[1] > self.min_pass_rate:
            more = "`prompts` or `samples_per_prompt`"
            ways.insert(-1, f"try more responses ({more}), for the true rate may be above it")
        return (
            f"The policy starts with a pass rate of {tried}, below `WarmStartGate.min_pass_rate`="
            f"{self.min_pass_rate:g}, so that reinforcement would spend its hours on zeros; "
            f"{', '.join(ways[:-1])}, or {ways[-1]}."
        )
