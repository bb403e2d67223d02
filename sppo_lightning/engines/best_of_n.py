"""The best of several independent samples."""

from __future__ import annotations

import dataclasses
import math

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines.engine import Engine, Response
from sppo_lightning.engines.sampling import Sampling
from sppo_lightning.engines.search import Candidate, Found, Request, SearchEngine, best_first
from sppo_lightning.errors import InputError


class BestOfN(SearchEngine):
    """Draws up to `n` independent responses to each prompt, some at a time, until one has full marks.

    The proposal: each response is a sample of the policy, and one of those with the best score is picked. So its
    density is `π(y) / P(score at least as good)`, and `log_excess` estimates that probability by the share of the
    prompt's responses.

    Args:
        engine: What samples; that of RolloutGeneration where SearchHopeless is given the search without one.
        n: Most responses per prompt.
        at_once: Responses per prompt of one call of the engine; all `n` where left out.
        budget_tokens: Most tokens generated per prompt: a round begins only where it has room for the longest
            responses. `n` alone bounds them where left out.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        n: int = 16,
        at_once: int | None = None,
        budget_tokens: int | None = None,
    ) -> None:
        super().__init__(engine)
        for name, value in (("n", n), ("at_once", at_once), ("budget_tokens", budget_tokens)):
            if value is not None and value < 1:
                raise InputError(f"`{name}`={value} of BestOfN leaves nothing to choose from; use 1 or more.")
        self.n = n
        self.at_once = min(at_once or n, n)
        self.budget_tokens = budget_tokens

    def search(self, batch: PromptBatch, sampling: Sampling) -> list[Found]:
        """Sample and judge, in rounds; prompts that are solved leave."""
        drawn: list[list[tuple[Response, float | None]]] = [[] for _ in batch.prompts]
        tokens = [0] * len(batch)
        while waiting := [i for i in range(len(batch)) if self._goes_on(drawn[i], tokens[i], sampling)]:
            # all have drawn alike, and the last round may have fewer left
            count = min(self.at_once, self.n - len(drawn[waiting[0]]))
            requests = [Request(i, [], f"from {len(drawn[i])}") for i in waiting]
            answers = self.sample(batch, requests, dataclasses.replace(sampling, samples_per_prompt=count))
            pairs = [(i, response) for i, row in zip(waiting, answers, strict=True) for response in row]
            scores = self.scores(
                [batch.prompts[i] for i, _ in pairs], [response.token_ids for _, response in pairs]
            )
            for (i, response), score in zip(pairs, scores, strict=True):
                drawn[i].append((response, score))
                tokens[i] += len(response.token_ids)
        return [best_first(candidates(row), used) for row, used in zip(drawn, tokens, strict=True)]

    def _goes_on(self, drawn: list[tuple[Response, float | None]], tokens: int, sampling: Sampling) -> bool:
        count = min(self.at_once, self.n - len(drawn))
        if not count or any(score is not None and score >= 1.0 for _, score in drawn):
            return False
        return self.budget_tokens is None or tokens + count * sampling.max_new_tokens <= self.budget_tokens


def candidates(drawn: list[tuple[Response, float | None]]) -> list[Candidate]:
    """The responses with a verdict, and how much likelier than by the policy it is to pick each."""
    judged = [(response, score) for response, score in drawn if score is not None]
    at_least = {score: sum(other >= score for _, other in judged) for _, score in judged}
    return [Candidate(response, score, math.log(len(judged) / at_least[score])) for response, score in judged]
