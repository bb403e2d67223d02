"""The stage that replaces prompts from which there is nothing to learn, as DAPO does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import ResamplingStage


class DynamicSampling(ResamplingStage):
    """Replaces prompts whose responses all have the same reward, hence no group advantage, by spare prompts.

    Spare prompts are sampled and scored by the stages listed before this one, in rounds, until every prompt of
    the batch is informative or `max_rounds` is reached. A prompt that is left without a replacement stays, so
    that the batch, its mini-batches and the losses' denominators keep their size. A prompt is informative when
    two of its responses have different rewards; shaping scores do not count, nor do responses without a verdict.

    Only training batches are changed. It is meant for advantages that compare the responses of a prompt: a
    critic would learn from prompts that were chosen by their outcome. List it right after the verifiers, since
    a callback before it that is no stage sees the batch as it was drawn.

    Logs, over all ranks, `rollout/informative_fraction` (share of the prompts, before the first round),
    `rollout/resampled_prompts` (spare prompts that were sampled) and `rollout/sampling_rounds`.

    Source: DAPO, arXiv 2503.14476, section 3.2 and equation 11, without a bound on the rounds.

    Args:
        max_rounds: Most times that spare prompts are sampled for one iteration.
    """

    def __init__(self, max_rounds: int = 3) -> None:
        super().__init__()
        if max_rounds < 1:
            raise InputError(
                f"`DynamicSampling.max_rounds`={max_rounds} samples nothing anew; use 1 or more, or leave "
                "DynamicSampling out of `trainer.callbacks`."
            )
        self.max_rounds = max_rounds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, to fit, that there are groups and spare prompts too."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for earlier in callbacks[: callbacks.index(self)]:
            samples = getattr(getattr(earlier, "sampling", None), "samples_per_prompt", 2)
            if samples < 2:
                raise InputError(
                    f"`{type(earlier).__name__}.sampling.samples_per_prompt`={samples} leaves DynamicSampling no "
                    "responses to compare; use 2 or more, or leave DynamicSampling out of `trainer.callbacks`."
                )
        data = getattr(trainer, "datamodule", None)
        if not hasattr(data, "spare_prompts"):
            raise InputError(
                f"DynamicSampling needs spare prompts, which {'a loader' if data is None else type(data).__name__} "
                "does not give; use sppo_lightning.data.PromptDataModule, or write its `spare_prompts(count)`."
            )

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Replace what is uninformative on `batch`, in as many rounds as any rank needs."""
        if not trainer.training:
            return
        assert batch.rollouts is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        open_places = uninformative(batch.rollouts, len(batch))
        needed, prompts = _over_ranks(trainer, module, len(open_places), len(batch))
        informative_fraction = 1.0 - needed / max(prompts, 1.0)
        rounds, resampled = 0, 0.0
        # every rank runs every round, if with no prompts
        while needed and rounds < self.max_rounds:
            spare = data.spare_prompts(len(open_places))
            self.sample(spare, trainer, module)
            rounds, resampled = rounds + 1, resampled + needed
            good = sorted(set(range(len(spare))) - set(uninformative(spare.rollouts, len(spare))))
            replace_prompts(batch, dict(zip(open_places, good, strict=False)), spare)
            open_places = open_places[len(good) :]
            (needed,) = _over_ranks(trainer, module, len(open_places))
        metrics = {
            "rollout/informative_fraction": informative_fraction,
            "rollout/resampled_prompts": resampled,
            "rollout/sampling_rounds": float(rounds),
        }
        module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)


def uninformative(rollouts: Rollouts, prompts: int) -> list[int]:
    """Which of `prompts` prompts, by index, have no two responses with verdicts and different rewards."""
    judged = ~(rollouts.rewards + rollouts.shaping).isnan()
    index, rewards = rollouts.prompt_index[judged], rollouts.rewards[judged]
    lowest = rewards.new_full((prompts,), torch.inf).scatter_reduce(0, index, rewards, "amin")
    highest = rewards.new_full((prompts,), -torch.inf).scatter_reduce(0, index, rewards, "amax")
    return (~(highest > lowest)).nonzero().squeeze(1).tolist()


def replace_prompts(batch: PromptBatch, replacements: Mapping[int, int], spare: PromptBatch) -> None:
    """Put prompts of `spare`, with their responses, in the places of prompts of `batch`.

    Args:
        batch: Changed in place; its lists and rollouts are new ones, ordered by prompt as before.
        replacements: Index in `batch` of each prompt that goes, and index in `spare` of the one that comes.
        spare: Other prompts, sampled and scored like those of `batch`.
    """
    if not replacements:
        return
    batch.prompts = _replaced(batch.prompts, replacements, spare.prompts)
    batch.token_ids = _replaced(batch.token_ids, replacements, spare.token_ids)
    batch.visits = _replaced(batch.visits, replacements, spare.visits)
    if batch.value_logits is not None:
        batch.value_logits = torch.stack(_replaced(batch.value_logits, replacements, spare.value_logits))
    batch.rollouts = _replaced_rollouts(batch.rollouts, replacements, spare.rollouts)
    batch.greedy_rollouts = _replaced_rollouts(batch.greedy_rollouts, replacements, spare.greedy_rollouts)


def _replaced(old: Iterable[Any], replacements: Mapping[int, int], new: Any) -> list[Any]:
    return [new[replacements[i]] if i in replacements else value for i, value in enumerate(old)]


def _replaced_rollouts(
    old: Rollouts | None, replacements: Mapping[int, int], new: Rollouts | None
) -> Rollouts | None:
    if old is None or new is None:
        return None
    places = {come: gone for gone, come in replacements.items()}
    kept = [(i, prompt) for i, prompt in enumerate(old.prompt_index.tolist()) if prompt not in replacements]
    added = [(i, places[prompt]) for i, prompt in enumerate(new.prompt_index.tolist()) if prompt in places]
    parts = [old.rows([i for i, _ in kept]), new.rows([i for i, _ in added])]
    joined = Rollouts.concat(parts, [prompt for _, prompt in kept + added])
    return joined.rows(joined.prompt_index.argsort(stable=True).tolist())


def _over_ranks(trainer: Trainer, module: LightningModule, *counts: int) -> list[float]:
    """The sum of each count over all ranks."""
    sums = torch.tensor(counts, dtype=torch.float32, device=module.device)
    return trainer.strategy.reduce(sums, reduce_op="sum").tolist()
