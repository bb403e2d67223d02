"""SPPO's baseline, pooled with the other responses to the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sppo_lightning import functional
from sppo_lightning.advantages import SequenceAdvantage
from sppo_lightning.errors import InputError, check_decay
from sppo_lightning.experience import Outcomes

_LEAST, _MOST = 0.25, 256.0  # what an estimate of k is kept between
_PSEUDO_PROMPTS = 16.0  # that the k to begin with counts as, in the estimate


class PooledAdvantage(SequenceAdvantage):
    """`A_i = R_i − (k·V + Σ_{j≠i} R_j) / (k + n − 1)` over the n responses to the prompt that have a verdict.

    The baseline is made of the critic's V, which counts as `k` responses, and of the prompt's others. A prompt
    with one response has SPPO's `R − V`, bit for bit. The critic's target stays R.

    The best k is `σ² / τ²`: the variance σ² of R around the prompt's pass rate p, over the mean τ² of `(V − p)²`.
    Where a prompt has several responses, their products `(R_i − V)(R_j − V)` have the mean τ², and the squares
    τ² + σ², so that k is estimated by running means of both over such prompts, of all ranks.

    Args:
        prior_strength: `k` to begin with.
        estimate: Go on with the estimate of k; false keeps `prior_strength`.
        running_decay: What is left of the sums behind the estimate after an iteration with such prompts.
    """

    def __init__(self, prior_strength: float = 4.0, estimate: bool = True, running_decay: float = 0.9) -> None:
        if not _LEAST <= prior_strength <= _MOST:
            raise InputError(
                f"`PooledAdvantage.prior_strength`={prior_strength} is no number of responses that V may count as; "
                f"use {_LEAST} to {_MOST:g}, such as 4."
            )
        check_decay(self, "running_decay", running_decay)
        self.prior_strength = prior_strength
        self.estimate = estimate
        self.running_decay = running_decay
        # running sums over prompts; of a reward of 0 or 1 whose V is 1/2, to begin with
        self.squares = _PSEUDO_PROMPTS / 4
        self.products = self.squares / (1 + prior_strength)

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N]`; see `Advantage`."""
        assert outcomes.value_logits is not None
        return functional.pooled_advantage(
            outcomes.penalized_rewards,
            outcomes.value_logits.sigmoid(),
            outcomes.rollouts.prompt_index,
            outcomes.verdicts,
            self.prior_strength,
        )

    def learn(self, outcomes: Outcomes) -> dict[str, float]:
        """Estimate k anew; see `Advantage`.

        Returns:
            The `k` that the iteration's advantages were made with.
        """
        metrics = {"critic/prior_strength": self.prior_strength}
        count, squares, products = outcomes.sum_over_ranks(_agreement(outcomes)).tolist()
        if self.estimate and count:
            self.squares = self.running_decay * self.squares + squares
            self.products = self.running_decay * self.products + products
            strength = self.squares / self.products - 1 if self.products > 0 else _MOST
            self.prior_strength = min(max(strength, _LEAST), _MOST)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What is estimated."""
        return {"prior_strength": self.prior_strength, "sums": (self.squares, self.products)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved; a k that is fixed stays as it is set."""
        if self.estimate:
            self.prior_strength = state_dict["prior_strength"]
            self.squares, self.products = state_dict["sums"]


def _agreement(outcomes: Outcomes) -> Tensor:
    """`[3]`, float64, over prompts with several verdicts: how many, and sums of mean squares and mean products.

    Of the differences `R − V`, the products being those of two different responses.
    """
    assert outcomes.value_logits is not None
    judged = outcomes.verdicts
    surprises = (outcomes.rewards - outcomes.value_logits.sigmoid()).double()[judged]
    _, group, sizes = torch.unique(outcomes.rollouts.prompt_index[judged], return_inverse=True, return_counts=True)
    sums = surprises.new_zeros(2, len(sizes)).index_add(1, group, torch.stack([surprises, surprises.square()]))
    several = sizes > 1
    (first, second), n = sums[:, several], sizes[several]
    products = (first.square() - second) / (n * (n - 1))
    return torch.stack([several.sum().double(), (second / n).sum(), products.sum()])
