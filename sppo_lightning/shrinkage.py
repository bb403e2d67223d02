"""SPPO's baseline, shrunk towards what is on record about the prompt itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppo_lightning.advantages import SequenceAdvantage
from sppo_lightning.errors import InputError, check_decay
from sppo_lightning.experience import Outcomes
from sppo_lightning.ranks import gather_objects
from sppo_lightning.records import PromptRecords


class ShrunkSequenceAdvantage(SequenceAdvantage):
    """`A = R − (w·V + (1 − w)·m)`: the critic's V and the mean m of the prompt's record, by how good each has been.

    `m = (k·p + s) / (k + n)` is the posterior mean under the prior Beta(k·p, k·(1 − p)): `k` is `prior_strength`,
    `p` the running mean of R over all prompts, and `s` of `n` (both decayed) the prompt's rewards and responses. A
    prompt without a record has m = p. The share is each predictor's inverse Brier score over the sum of both,
    `w = (1/B_V) / (1/B_V + 1/B_m) = B_m / (B_V + B_m)`, with running mean squared errors on outcomes that neither
    predictor had seen; before the first of them w = 1, which is SPPO. The critic's target stays R.

    All ranks keep the same record of all prompts, two numbers each.

    Args:
        prior_strength: `k`, the responses that the prior counts as.
        decay: What is left of a prompt's `s` and `n` at its next visit, because the policy has moved on.
        running_decay: What is left of the sums behind `p`, `B_V` and `B_m` after an iteration.
    """

    def __init__(self, prior_strength: float = 2.0, decay: float = 0.8, running_decay: float = 0.9) -> None:
        if not prior_strength > 0:
            raise InputError(
                f"`ShrunkSequenceAdvantage.prior_strength`={prior_strength} leaves a prompt without a record no "
                "baseline; use more than 0, such as 2."
            )
        check_decay(self, "decay", decay)
        check_decay(self, "running_decay", running_decay)
        self.prior_strength = prior_strength
        self.running_decay = running_decay
        self.records = PromptRecords(decay, running_decay)  # m, and p, its running mean
        self.critic_error = self.record_error = 0.0  # running sums of squares, over the same responses

    @property
    def weight(self) -> float:
        """`w`, the critic's share of the baseline."""
        total = self.critic_error + self.record_error
        return self.record_error / total if total else 1.0

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N]`; see `Advantage`."""
        assert outcomes.value_logits is not None
        values = outcomes.value_logits.sigmoid()
        means = [self.records.mean(prompt.key, self.prior_strength) for prompt in outcomes.rollouts.prompts]
        records = torch.tensor(means, dtype=values.dtype, device=values.device)
        return outcomes.penalized_rewards - (self.weight * values + (1 - self.weight) * records)

    def learn(self, outcomes: Outcomes) -> dict[str, float]:
        """Measure both predictors on the outcomes of all ranks, then enter these in the records; see `Advantage`.

        Returns:
            The `w` that the iteration's advantages were made with, and the Brier score of `m` on its outcomes.
        """
        assert outcomes.value_logits is not None
        columns = (outcomes.rewards, outcomes.value_logits.sigmoid(), outcomes.verdicts)
        own = [
            (prompt.key, reward, value)
            for prompt, reward, value, verdict in zip(
                outcomes.rollouts.prompts, *(column.tolist() for column in columns), strict=True
            )
            if verdict
        ]
        rows = [row for part in gather_objects(own) for row in part]
        if not rows:
            return {"critic/shrinkage_weight": self.weight}
        critic_error = sum((reward - value) ** 2 for _, reward, value in rows)
        record_error = sum((reward - self.records.mean(key, self.prior_strength)) ** 2 for key, reward, _ in rows)
        metrics = {"critic/shrinkage_weight": self.weight, "critic/record_brier": record_error / len(rows)}
        self.critic_error = self.running_decay * self.critic_error + critic_error
        self.record_error = self.running_decay * self.record_error + record_error
        self.records.enter([(key, reward) for key, reward, _ in rows])
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The records and the running sums."""
        return self.records.state_dict() | {"errors": (self.critic_error, self.record_error)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved."""
        self.records.load_state_dict(state_dict)
        self.critic_error, self.record_error = state_dict["errors"]
