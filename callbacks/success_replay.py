"""The stage that lets the policy learn again from successes that are rare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sppo_lightning.batch import PromptBatch, PromptKey, Success
from sppo_lightning.errors import check_settings
from sppo_lightning.experience import Experience
from sppo_lightning.found_losses import FoundLoss, OffPolicySamples
from sppo_lightning.module import SPPOModule
from sppo_lightning.pipeline import Stage
from sppo_lightning.ranks import gather_objects
from sppo_lightning.records import PromptRecords
from sppo_lightning.success_store import SuccessStore
from sppo_lightning.successes import learn


class SuccessReplay(Stage):
    """Keeps verified successes of prompts that hardly ever have one, and learns from some in every iteration.

    A success has full marks by every outcome verifier and was not cut off. It is kept while its prompt's pass rate
    is low: the posterior mean `(k·p + s) / (k + n)`, `s` of `n` responses (both decayed) having had full marks, the
    present ones included, with the prior mean `p = V`, or the running mean where no critic reads prompts alone.
    Where that has risen to `below` at a later visit, the prompt's successes retire. What SearchHopeless finds is
    kept too, but is no part of the record.

    What is drawn, evenly and without replacement, is learned from in an auxiliary loss, `coef · mean over tokens of
    −0.5 ** (age / half_life_iterations) · weight · log π(y_t | …)`, whose gradient joins that of the iteration's
    first update; if that is skipped, so is the replay. The advantage in the weight is R less the present V.
    The critic never learns from what is replayed. While it warms up, successes are kept and nothing is replayed.
    An iteration's own successes are first replayed in the next one.

    All ranks keep the same store and deal out what is drawn, so their number changes nothing.

    Logs, over all ranks, `replay/rows`, `replay/age_mean` (iterations), `replay/weight_mean`,
    `replay/truncated_fraction`, `replay/loss`, `replay/stored` and `replay/retired`.

    Source: self-imitation, arXiv 1806.05635, whose `max(R − V, 0)` is the advantage here; importance weights are
    added to it.

    Args:
        below: Posterior mean pass rate, above 0 and at most 1, under which a prompt's successes are kept.
        rows: Most successes replayed in an iteration, over all ranks.
        loss: What each one weighs.
        coef: Weight of the auxiliary loss.
        half_life_iterations: Iterations after which a success that was not seen again counts half as much.
        capacity: Most successes kept; those that were seen longest ago go first.
        per_prompt: Most of them of one prompt.
        prior_strength: `k`, the responses that the prior counts as.
        decay: What is left of a prompt's `s` and `n` at its next visit, because the policy has moved on.
        seed: Of the draws.
    """

    requires = frozenset({"rollouts", "scores"})
    phase = "replay"
    once = True
    rewinds = True  # the batch at hand changes nothing before it ends

    def __init__(
        self,
        below: float = 0.25,
        rows: int = 16,
        loss: FoundLoss | None = None,
        coef: float = 0.1,
        half_life_iterations: float = 8.0,
        capacity: int = 1024,
        per_prompt: int = 4,
        prior_strength: float = 8.0,
        decay: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_settings(
            "SuccessReplay",
            ("below", below, 0 < below <= 1, "above 0 and at most 1"),
            ("rows", rows, rows >= 1, "1 or more"),
            ("coef", coef, 0 < coef < float("inf"), "above 0"),
            ("half_life_iterations", half_life_iterations, half_life_iterations > 0, "above 0"),
            ("capacity", capacity, capacity >= 1, "1 or more"),
            ("per_prompt", per_prompt, per_prompt >= 1, "1 or more"),
            ("prior_strength", prior_strength, prior_strength > 0, "above 0"),
            ("decay", decay, 0 <= decay <= 1, "from 0 to 1"),
        )
        self.below = below
        self.rows = rows
        self.loss = loss or OffPolicySamples()
        self.coef = coef
        self.half_life_iterations = half_life_iterations
        self.store = SuccessStore(capacity, per_prompt, seed)
        self.prior_strength = prior_strength
        self.records = PromptRecords(decay)

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Leave the gradient of what is replayed for the first update."""
        if not trainer.training:
            return
        assert isinstance(module, SPPOModule)
        assert batch.rollouts is not None
        if "policy" not in module.moving_modules():
            return
        drawn = self.store.draw(self.rows)
        metrics = {"rows": float(len(drawn))}
        if drawn:
            own = drawn[module.global_rank :: trainer.world_size]
            ages = torch.tensor([self.store.iteration - success.iteration for success in own], dtype=torch.float64)
            shares = 0.5 ** (ages / self.half_life_iterations)
            with trainer.precision_plugin.forward_context():
                values, temperature = self._values(own, module), batch.rollouts.temperature
                learned = learn(own, values, shares, self.loss, self.coef, temperature, module)
            age = self.store.iteration - sum(success.iteration for success in drawn) / len(drawn)
            metrics |= {"age_mean": age} | learned
        _log(module, metrics)

    def _values(self, successes: Sequence[Success], module: SPPOModule) -> Tensor:
        """The chance of each one's prompt now, `[M]`: the critic's, or else what is on record."""
        if module.critic is None or module.critic.reads != "prompt":
            return torch.tensor(
                [self.records.mean(success.prompt.key, self.prior_strength) for success in successes],
                dtype=torch.float64,
            )
        prompts, ids = [each.prompt for each in successes], [[*each.prompt_ids] for each in successes]
        values = module.prompt_values(PromptBatch(prompts, ids, [0 for _ in successes]))
        assert values is not None
        return values

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Enter what was learned from in the records, and keep what is rare."""
        taught = (outputs or {}).get("taught")  # supervised learning has none
        if taught is None:
            return
        risen, rare = self._enter(taught, batch.found)
        retired = self.store.retire(risen)
        self.store.add(rare)
        self.store.iteration += 1
        _log(pl_module, {"stored": float(len(self.store.stored)), "retired": float(retired)})

    def _enter(self, taught: Experience, found: Sequence[Success]) -> tuple[set[PromptKey], list[Success]]:
        """Enter all ranks' outcomes; prompts whose record is not low now, and the successes of the others."""
        rollouts, values = taught.rollouts, taught.values
        keys = [prompt.key for prompt in rollouts.prompts]
        priors = values.tolist() if values is not None and values.ndim == 1 else [None for _ in keys]
        passed = (rollouts.correct & taught.verdicts).tolist()
        own = list(zip(keys, passed, taught.verdicts.tolist(), priors, strict=True))
        # sorted, because sums depend on the order, and the order of ranks on how many there are
        seen = sorted((row for part in gather_objects(own) for row in part), key=lambda row: row[:2])
        self.records.enter([(key, float(passes)) for key, passes, has_verdict, _ in seen if has_verdict])
        means = {key: self.records.mean(key, self.prior_strength, prior) for key, _, _, prior in seen}
        risen = {key for key, mean in means.items() if mean >= self.below}
        rare = [
            *(
                _success(taught, i)
                for i, passes in enumerate(passed)
                if passes and keys[i] not in risen and rollouts.finish_reasons[i] == "stop"
            ),
            *(each for each in found if each.prompt.key not in risen),
        ]
        return risen, [each for part in gather_objects(rare) for each in part]

    def state_dict(self) -> dict[str, Any]:
        """The store and the records, which are the same on every rank."""
        return {"store": self.store.state_dict(), "records": self.records.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved, on any number of ranks."""
        self.store.load_state_dict(state_dict["store"])
        self.records.load_state_dict(state_dict["records"])


def _success(experience: Experience, row: int) -> Success:
    """The response in this row."""
    rollouts = experience.rollouts
    mask = rollouts.response_mask[row] > 0
    return Success(
        rollouts.prompts[row],
        rollouts.prompt_ids[row][rollouts.prompt_mask[row] > 0].tolist(),
        rollouts.response_ids[row][mask].tolist(),
        rollouts.sampled_log_probs[row][mask].tolist(),
        experience.rewards[row].item(),
    )


def _log(module: LightningModule, metrics: dict[str, float]) -> None:
    named = {f"replay/{name}": value for name, value in metrics.items()}
    module.log_dict(named, on_step=True, on_epoch=False, batch_size=1)
