"""What every rollout engine does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from sppo_lightning.batch import FinishReason, PromptBatch, Rollouts
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.engines.sampling import Sampling
from sppo_lightning.models import CausalLMPolicy


@dataclass(frozen=True, slots=True)
class Response:
    """One finished response."""

    prompt_index: int  # row of its prompt in the batch
    sample: int  # which of the prompt's responses, from 0
    token_ids: list[int]  # T, the end-of-sequence token included
    log_probs: list[float]  # T, nats, of the distribution that was sampled from
    finish_reason: FinishReason
    policy_version: int  # of the weights that sampled it


class Engine(ABC):
    """Samples responses from the policy.

    An engine returns token ids, the log-probabilities of the distribution that it sampled from and its own
    `finish_reason`; the same prompt, visit and seed give the same response whatever else is in the batch.
    A subclass writes `update_weights` and `stream`; `policy` and `version` are what the former was given.
    """

    samples_elsewhere: ClassVar[bool] = False  # whether a thread that waits for responses takes no time from others
    policy: CausalLMPolicy | None = None
    version: int = 0

    @abstractmethod
    def update_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Sample from these weights from now on; `version` is written into the rollouts."""

    @abstractmethod
    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """Sample `sampling.samples_per_prompt` responses per prompt; each is yielded when it has finished.

        The iterator is read to its end; nothing else is asked of the engine meanwhile.
        """

    def generate(self, batch: PromptBatch, sampling: Sampling) -> Rollouts:
        """All responses of `stream`, prompt by prompt, in the batch's order."""
        responses = list(self.stream(batch, sampling))
        assert self.policy is not None
        return collect(responses, batch, sampling, self.policy)

    def close(self) -> None:
        """Give back processes, connections and memory, which come back when they are needed again."""
        return


def collect(
    responses: Iterable[Response], batch: PromptBatch, sampling: Sampling, policy: CausalLMPolicy
) -> Rollouts:
    """Responses in any order as rollouts on the policy's device, prompt by prompt, in the batch's order."""
    ordered = sorted(responses, key=lambda response: (response.prompt_index, response.sample))
    return pack_rollouts(
        batch,
        [response.prompt_index for response in ordered],
        [response.token_ids for response in ordered],
        [response.log_probs for response in ordered],
        [response.finish_reason for response in ordered],
        policy=policy,
        temperature=sampling.temperature or 1.0,  # a greedy response is scored at temperature 1
        versions=[response.policy_version for response in ordered],
    )
