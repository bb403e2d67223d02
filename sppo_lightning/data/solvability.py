"""Prompts by how solvable they look: to the critic, or by their own record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sppo_lightning.batch import Prompt
from sppo_lightning.data.curriculum import FlooredCurriculum, check_positive, check_share
from sppo_lightning.errors import InputError


class SolvabilityCurriculum(FlooredCurriculum):
    """Draws prompts by `(V(1 − V))^c` of the critic, which reads them all again every few iterations.

    `V(1 − V)` is the variance of a reward of 0 or 1 that is 1 with the chance V, so it is what `A²` of SPPO's
    `A = R − V` is expected to be where the critic is right. Prompts that are always or never solved are passed over
    before they cost a response. Until the first scores all prompts are drawn alike, and the critic learns.

    Args:
        rescore_every_n_iterations: Iterations between two readings of the whole prompt set.
        sharpness: `c`; more draws closer to V = 1/2. Where most prompts are nearly hopeless, they have most of the
            draws together, small as the weight of each is; 2 leaves them few.
        floor: The share of the draws that is spread evenly over all prompts, which keeps the critic informed.
    """

    remembered = (*FlooredCurriculum.remembered, "values", "scored_at")

    def __init__(self, rescore_every_n_iterations: int = 20, sharpness: float = 1.0, floor: float = 0.1) -> None:
        super().__init__(floor)
        check_positive(self, "rescore_every_n_iterations", rescore_every_n_iterations, "1 or more, such as 20")
        check_positive(self, "sharpness", sharpness, "1, or more to draw closer to V = 1/2")
        self.sharpness = sharpness
        self.rescore_every_n_iterations = rescore_every_n_iterations

    def bind(self, prompts: Sequence[Prompt], batch_size: int, seed: int, shuffle: bool) -> None:
        """See `Curriculum`."""
        super().bind(prompts, batch_size, seed, shuffle)
        self.values = np.full(len(prompts), 0.5)  # [P], V
        self.scored_at = -1  # the first iteration that was drawn by these; -1 before there are any

    def check_module(self, module: Any) -> None:
        """Refuse a module without a critic."""
        super().check_module(module)
        if getattr(module, "critic", None) is None:
            raise InputError(
                "`data.curriculum`=SolvabilityCurriculum asks a critic, and `model.critic` is null; give one, or "
                "use PassRateCurriculum."
            )

    @property
    def wants_values(self) -> bool:
        """After every n-th iteration."""
        return self.iteration % self.rescore_every_n_iterations == 0

    def rescore(self, values: np.ndarray) -> None:
        """See `Curriculum`."""
        # a critic that has come to no number says nothing, and must not end the run here
        self.values = np.nan_to_num(values.astype(np.float64), nan=0.5).clip(0.0, 1.0)
        self.scored_at = self.iteration

    def pass_rates(self) -> np.ndarray:
        """`[P]`, V."""
        return self.values

    def weights(self) -> np.ndarray:
        """`[P]`, (V(1 − V))^c."""
        return (self.values * (1 - self.values)) ** self.sharpness

    def describe(self, positions: np.ndarray) -> dict[str, float]:
        """The distribution over V too, and the iterations since it was asked for."""
        age = {} if self.scored_at < 0 else {"staleness": float(self.iteration - self.scored_at)}
        return super().describe(positions) | age


class PassRateCurriculum(FlooredCurriculum):
    """Draws prompts by what their own record says of their pass rate p: most often those near a target.

    The posterior of p is `Beta(a, b)` with `a = k/2 + s` and `b = k/2 + n − s`: `k` is `prior_strength`, `s` of `n`
    the prompt's rewards and responses, which count half after `half_life_iterations` because the policy moves. The
    weight is the posterior mean of `p^(2ct) (1 − p)^(2c(1 − t))` with the target t and the sharpness c: of
    `p(1 − p)`, the variance of the reward, by default. A prompt without a record has the prior, and so in the end
    has one whose record is old.

    Args:
        target_pass_rate: `t`, where the weight is greatest for a pass rate that is known.
        sharpness: `c`; more narrows the draws around the target.
        prior_strength: `k`, the responses that the prior counts as.
        half_life_iterations: Iterations after which a response counts half as much.
        floor: The share of the draws that is spread evenly over all prompts.
    """

    remembered = (*FlooredCurriculum.remembered, "successes", "responses")

    def __init__(
        self,
        target_pass_rate: float = 0.5,
        sharpness: float = 1.0,
        prior_strength: float = 2.0,
        half_life_iterations: float = 100.0,
        floor: float = 0.1,
    ) -> None:
        super().__init__(floor)
        check_share(self, "target_pass_rate", target_pass_rate, "the pass rate to learn most from, such as 0.5")
        check_positive(self, "sharpness", sharpness, "1, or more to draw closer to the target")
        check_positive(self, "prior_strength", prior_strength, "the responses that the prior counts as, such as 2")
        check_positive(self, "half_life_iterations", half_life_iterations, "as many as the policy stays alike, 100")
        self.target_pass_rate = target_pass_rate
        self.sharpness = sharpness
        self.prior_strength = prior_strength
        self.half_life_iterations = half_life_iterations

    def bind(self, prompts: Sequence[Prompt], batch_size: int, seed: int, shuffle: bool) -> None:
        """See `Curriculum`."""
        super().bind(prompts, batch_size, seed, shuffle)
        self.successes = np.zeros(len(prompts))  # [P], s as of `last_seen`
        self.responses = np.zeros(len(prompts))  # [P], n as of `last_seen`

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """`[P]` each: a and b of every prompt's Beta distribution at the present iteration."""
        kept = self._kept()
        prior, successes = self.prior_strength / 2, kept * self.successes
        return prior + successes, prior + kept * self.responses - successes

    def pass_rates(self) -> np.ndarray:
        """`[P]`, the posterior means `a / (a + b)`."""
        a, b = self.posterior()
        return a / (a + b)

    def weights(self) -> np.ndarray:
        """`[P]`, `B(a + 2ct, b + 2c(1 − t)) / B(a, b)` with the Beta function B."""
        a, b = map(torch.from_numpy, self.posterior())
        for_success = 2 * self.sharpness * self.target_pass_rate
        for_failure = 2 * self.sharpness - for_success
        return (_log_beta(a + for_success, b + for_failure) - _log_beta(a, b)).exp().numpy()

    def observe(self, positions: np.ndarray, rewards: np.ndarray) -> None:
        """Enter the outcomes in the records of their prompts; see `Curriculum`."""
        seen = np.unique(positions)
        kept = self._kept()[seen]
        self.successes[seen] *= kept
        self.responses[seen] *= kept
        np.add.at(self.successes, positions, rewards)
        np.add.at(self.responses, positions, 1.0)
        super().observe(positions, rewards)

    def describe(self, positions: np.ndarray) -> dict[str, float]:
        """The distribution over posterior means too, and the mean age of the records in iterations."""
        ages = self.iteration - self.last_seen[self.last_seen >= 0]
        return super().describe(positions) | ({"staleness": float(ages.mean())} if len(ages) else {})

    def _kept(self) -> np.ndarray:
        """`[P]`, what is left of each record."""
        return 0.5 ** ((self.iteration - self.last_seen) / self.half_life_iterations)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
