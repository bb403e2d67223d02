"""What searches have in common: another engine that samples, a judge, and what was found."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.sampling import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy

# scores in [0, 1], 1.0 being a success and None no verdict, of N responses to N prompts
Judge = Callable[[list[Prompt], list[str]], Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response that a search came upon."""

    response: Response  # its log-probabilities are the policy's, token by token
    score: float  # the judge's
    log_excess: float  # nats: log of the density that the search gives it, less that of the policy; an estimate


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of one prompt's search."""

    candidates: list[Candidate]  # judged responses, best first; in the order in which they came where scores tie
    tokens: int  # generated in all

    @property
    def solved(self) -> bool:
        """Whether one has full marks."""
        return bool(self.candidates) and self.candidates[0].score >= 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that is sampled behind a prefix."""

    prompt_index: int  # row in the batch
    prefix: list[int]  # response tokens that are there already
    key: str  # what tells its noise from that of the prompt's other requests


class SearchEngine(Engine):
    """An engine that wraps another one and looks for a response that the judge gives full marks.

    What it finds is chosen by the judge and is not a sample of the policy: each `Candidate` says by how much.
    `stream` gives the `samples_per_prompt` best responses of each prompt, or fewer where fewer were judged.
    The judge reads prompts and gold answers, so an engine in another process goes inside, never around it.

    Args:
        engine: What samples; set by the stage that uses the search where left out.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        if isinstance(engine, SearchEngine):
            name = type(engine).__name__
            raise InputError(
                f"`engine`={name} of {type(self).__name__} is a search itself; use HFEngine or another."
            )
        self.engine = engine
        self.judge: Judge | None = None  # set by whoever has the verifiers

    @abstractmethod
    def search(self, batch: PromptBatch, sampling: Sampling) -> list[Found]:
        """What is found for each prompt of the batch."""

    def update_weights(self, policy: CausalLMPolicy, version: int) -> None:
        """Search with these weights from now on."""
        self._wrapped.update_weights(policy, version)
        self.policy, self.version = policy, version

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        """The best responses found, which are no samples of the policy; see `Engine.stream`."""
        for i, found in enumerate(self.search(batch, sampling)):
            for sample, candidate in enumerate(found.candidates[: sampling.samples_per_prompt]):
                yield dataclasses.replace(candidate.response, prompt_index=i, sample=sample)

    def close(self) -> None:
        """Close the wrapped engine."""
        if self.engine is not None:
            self.engine.close()

    @property
    def _wrapped(self) -> Engine:
        if self.engine is None:
            raise InputError(f"{type(self).__name__} has no `engine` that samples; give it one, such as HFEngine.")
        return self.engine

    def sample(self, batch: PromptBatch, requests: Sequence[Request], sampling: Sampling) -> list[list[Response]]:
        """`sampling.samples_per_prompt` continuations of each request, in one call of the wrapped engine.

        Siblings are samples of one request where they can be, so that HFEngine prefills their prefix once; an
        engine that keeps prefixes, such as vLLM, meets the same token ids again.
        """
        owners = [batch.prompts[request.prompt_index] for request in requests]
        prompts = PromptBatch(
            # the data set's name keys the noise, so each request has its own
            [
                dataclasses.replace(owner, dataset=f"{owner.dataset} search {request.key}")
                for owner, request in zip(owners, requests, strict=True)
            ],
            [batch.token_ids[request.prompt_index] + request.prefix for request in requests],
            [batch.visits[request.prompt_index] for request in requests],
            [batch.first_samples[request.prompt_index] for request in requests],
        )
        answers: list[list[Response]] = [[] for _ in requests]
        for response in sorted(self._wrapped.stream(prompts, sampling), key=lambda each: each.sample):
            answers[response.prompt_index].append(response)
        return answers

    def scores(self, prompts: list[Prompt], responses: Sequence[list[int]]) -> list[float | None]:
        """The judge's scores of responses, given as token ids; the judge is called once."""
        if self.judge is None or self.policy is None:
            raise InputError(
                f"{type(self).__name__} has no judge of what it finds; let a stage that has the verifiers use it, "
                "such as sppo_lightning.callbacks.SearchHopeless, and give RolloutGeneration the engine within."
            )
        if not responses:
            return []
        texts = self.policy.tokenizer.batch_decode(list(responses), skip_special_tokens=True)
        given = self.judge(prompts, texts)
        return [None if score is None or math.isnan(score) else float(score) for score in given]


def best_first(candidates: Sequence[Candidate], tokens: int) -> Found:
    """What a search of so many tokens found."""
    return Found(sorted(candidates, key=lambda candidate: -candidate.score), tokens)


def success_per_1k_tokens(founds: Sequence[Found]) -> float:
    """Prompts solved per thousand generated tokens; 0 where nothing was generated."""
    tokens = sum(found.tokens for found in founds)
    return 1000.0 * sum(found.solved for found in founds) / tokens if tokens else 0.0
