"""Advantages: how much better a response did than was expected of its prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sppo_lightning import functional
from sppo_lightning.errors import InputError
from sppo_lightning.experience import Outcomes


class Advantage(ABC):
    """Turns rewards and the critic's values into advantages; owns its settings and calls `functional`.

    What an advantage needs of the rest of the run is checked before anything is loaded.
    """

    critic: ClassVar[Literal["prompt", "token"] | None] = None  # what its critic reads; None for no critic
    token_level: ClassVar[bool] = False  # whether it gives each token an advantage of its own
    min_samples: ClassVar[int] = 1  # responses per prompt
    needs_greedy: ClassVar[bool] = False  # whether each prompt needs a greedy response too

    @abstractmethod
    def __call__(self, outcomes: Outcomes) -> Tensor:
        """Advantages: `[N]`, one per response, or `[N, T]` where `token_level`.

        Rows without a verdict hold anything; they are masked later.
        """

    def value_targets(self, outcomes: Outcomes) -> Tensor:
        """What the critic's V should have been, `[N]`, or `[N, T]` where it reads tokens: `R`, and nothing else.

        Shaping and penalties are the policy's business: the critic predicts the chance of success.
        """
        return outcomes.rewards

    def learn(self, outcomes: Outcomes) -> dict[str, float]:
        """Learn from an iteration's outcomes, after its updates, and return what to log; nothing by default.

        All ranks call it, and must log the same names.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What it has learned, the same on every rank, in plain types."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Go on where a checkpoint was saved."""


class SequenceAdvantage(Advantage):
    """SPPO: `A = R − sigmoid(v)`, the same for every token, without whitening (arXiv 2604.08865)."""

    critic = "prompt"

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N]`; see `Advantage`."""
        assert outcomes.value_logits is not None
        return functional.sequence_advantage(outcomes.penalized_rewards, outcomes.value_logits)


class BatchMeanAdvantage(Advantage):
    """REINFORCE with the mean reward of the iteration, over all ranks, as the only baseline: `A = R − mean(R)`."""

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N]`; see `Advantage`."""
        rewards, verdicts = outcomes.penalized_rewards, outcomes.verdicts.to(outcomes.rewards.dtype)
        total, count = outcomes.sum_over_ranks(torch.stack([(rewards * verdicts).sum(), verdicts.sum()]))
        return rewards - total / count.clamp(min=1)


class GroupAdvantage(Advantage):
    """GRPO: `A = (R − mean) / std` among the responses to one prompt (arXiv 2402.03300).

    Args:
        scale_by_std: Divide by the group's standard deviation; false for Dr. GRPO (arXiv 2503.20783).
    """

    min_samples = 2

    def __init__(self, scale_by_std: bool = True) -> None:
        self.scale_by_std = scale_by_std

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N]`; see `Advantage`."""
        return _in_groups(outcomes, lambda r, g: functional.group_advantage(r, g, self.scale_by_std))


class LeaveOneOutAdvantage(Advantage):
    """RLOO: `A = R − mean of the other responses to the prompt` (arXiv 2402.14740)."""

    min_samples = 2

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N]`; see `Advantage`."""
        return _in_groups(outcomes, functional.leave_one_out_advantage)


class GreedyBaselineAdvantage(Advantage):
    """ReMax: `A = R − R of the prompt's greedy response` (arXiv 2310.10505)."""

    needs_greedy = True

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N]`; see `Advantage`."""
        assert outcomes.greedy_rewards is not None
        return functional.greedy_baseline_advantage(outcomes.penalized_rewards, outcomes.greedy_rewards)


class GAE(Advantage):
    """Token-level PPO: generalized advantages of a critic that reads every token (arXiv 1506.02438).

    Args:
        gamma: Discount γ per token.
        lam: Trace decay λ; 1 makes the advantage the return minus the value.
        whiten: Give advantages mean 0 and variance 1 over the iteration's tokens, over all ranks.
    """

    critic = "token"
    token_level = True

    def __init__(self, gamma: float = 1.0, lam: float = 1.0, whiten: bool = True) -> None:
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise InputError(f"`{type(self).__name__}.{name}`={value} cannot be used; it must be from 0 to 1.")
        self.gamma = gamma
        self.lam = lam
        self.whiten = whiten

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N, T]`; see `Advantage`."""
        assert outcomes.token_values is not None
        mask = outcomes.mask
        rewards = functional.last_token_rewards(outcomes.rewards, mask, outcomes.penalties)
        advantages, _ = functional.gae(rewards, outcomes.token_values, mask, self.gamma, self.lam, whiten=False)
        return functional.whiten_tokens(advantages, mask, outcomes.sum_over_ranks) if self.whiten else advantages

    def value_targets(self, outcomes: Outcomes) -> Tensor:
        """`[N, T]`: the λ-returns of the verifiers' reward alone; `R` at every token where γ = λ = 1."""
        assert outcomes.token_values is not None
        mask = outcomes.mask
        rewards = functional.last_token_rewards(outcomes.rewards, mask)
        return functional.gae(rewards, outcomes.token_values, mask, self.gamma, self.lam, whiten=False)[1]


class HybridAdvantage(GAE):
    """`w · A_seq + (1 − w) · A_gae` of one token-level critic, whose value at the prompt's end is `V(s_p)`.

    Args:
        weight: `w`, the share of the sequence-level advantage `R − V(s_p)`, from 0 to 1.
        gamma: Discount γ per token.
        lam: Trace decay λ.
        whiten: Whiten the token-level part; it then has another unit than the sequence-level one.
    """

    def __init__(self, weight: float = 0.5, gamma: float = 1.0, lam: float = 1.0, whiten: bool = False) -> None:
        super().__init__(gamma, lam, whiten)
        if not 0 <= weight <= 1:
            raise InputError(f"`HybridAdvantage.weight`={weight} is no share; use a number from 0 to 1.")
        self.weight = weight

    def __call__(self, outcomes: Outcomes) -> Tensor:
        """`[N, T]`; see `Advantage`."""
        assert outcomes.token_values is not None
        sequence = outcomes.penalized_rewards - outcomes.token_values[:, 0]
        return functional.blend_advantages(sequence, super().__call__(outcomes), outcomes.mask, self.weight)


def _in_groups(outcomes: Outcomes, advantage: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`advantage(rewards, groups)` of the rows with a verdict; 0 where a prompt has fewer than two of them."""
    groups, rewards = outcomes.rollouts.prompt_index, outcomes.penalized_rewards
    sizes = torch.zeros(int(groups.max()) + 1 if len(groups) else 0, device=groups.device, dtype=torch.long)
    sizes = sizes.index_add(0, groups, outcomes.verdicts.long())
    rows = (outcomes.verdicts & (sizes[groups] > 1)).nonzero().squeeze(1)
    return torch.zeros_like(rewards).index_copy(0, rows, advantage(rewards[rows], groups[rows]))
