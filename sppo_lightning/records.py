"""What is on record about each prompt: the rewards of its responses, which lose weight from visit to visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sppo_lightning.batch import PromptKey


@dataclass
class PromptRecords:
    """Two numbers per prompt, and a running mean over all prompts; alike on ranks that enter the same.

    Args:
        decay: What is left of a prompt's sums at its next visit, because the policy has moved on.
        running_decay: What is left of the sums over all prompts after an iteration.
    """

    decay: float
    running_decay: float = 0.9
    sums: dict[PromptKey, tuple[float, float]] = field(default_factory=dict)  # s and n: rewards and responses
    rewards: float = 0.0  # over all prompts
    responses: float = 0.0  # over all prompts

    @property
    def running_mean(self) -> float:
        """The running mean of the rewards; 0.5 before the first one."""
        return self.rewards / self.responses if self.responses else 0.5

    def of(self, key: PromptKey) -> tuple[float, float]:
        """`s` and `n` of a prompt: the decayed sums of its rewards and of its responses."""
        return self.sums.get(key, (0.0, 0.0))

    def mean(self, key: PromptKey, strength: float, prior: float | None = None) -> float:
        """Posterior mean `(k·p + s) / (k + n)` under the prior Beta(k·p, k·(1 − p)).

        Args:
            key: Whose.
            strength: `k`, the responses that the prior counts as, above 0.
            prior: `p`; the running mean where left out.
        """
        successes, responses = self.of(key)
        prior = self.running_mean if prior is None else prior
        return (strength * prior + successes) / (strength + responses)

    def enter(self, rewards: Sequence[tuple[PromptKey, float]]) -> None:
        """Add an iteration's rewards; several responses to a prompt are one visit."""
        if not rewards:
            return
        self.rewards = self.running_decay * self.rewards + sum(reward for _, reward in rewards)
        self.responses = self.running_decay * self.responses + len(rewards)
        for key in {key for key, _ in rewards}:
            successes, responses = self.of(key)
            self.sums[key] = (self.decay * successes, self.decay * responses)
        for key, reward in rewards:
            successes, responses = self.sums[key]
            self.sums[key] = (successes + reward, responses + 1)

    def state_dict(self) -> dict[str, Any]:
        """The sums, in plain types."""
        records = [(*key, *record) for key, record in self.sums.items()]
        return {"records": records, "running": (self.rewards, self.responses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved."""
        self.sums = {(dataset, row): (s, n) for dataset, row, s, n in state_dict["records"]}
        self.rewards, self.responses = state_dict["running"]
