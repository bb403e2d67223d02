"""An engine whose policy is a rule that a test writes: the next word's probabilities, given the response so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sppo_lightning.batch import PromptBatch
from sppo_lightning.engines import Engine, Sampling
from sppo_lightning.engines.engine import Response
from sppo_lightning.engines.sampling import run_seed, token_noise
from sppo_lightning.engines.stop_strings import StopStrings

Rule = Callable[[list[str]], Mapping[str, float]]


class TableEngine(Engine):
    """Samples words by `rule`; prompts have `prompt_tokens` tokens, so that what is behind them is known."""

    def __init__(self, rule: Rule, prompt_tokens: int) -> None:
        self.rule, self.prompt_tokens = rule, prompt_tokens
        self.calls: list[tuple[int, Sampling]] = []  # prompts of each call, and how they were sampled
        self.generated: dict[int, int] = {}  # tokens by the prompt's row

    def update_weights(self, policy: Any, version: int) -> None:
        self.policy, self.version = policy, version

    def stream(self, batch: PromptBatch, sampling: Sampling) -> Iterator[Response]:
        assert self.policy is not None
        self.calls.append((len(batch), sampling))
        stop = StopStrings(self.policy.tokenizer, sampling.stop)
        requests = [(i, s) for i in range(len(batch)) for s in range(sampling.samples_per_prompt)]
        for i, sample in reversed(requests):  # an order that nobody may rely on
            noise = token_noise(run_seed(), *batch.noise_key(i, sample), sampling.max_new_tokens)
            ids, log_probs, stopped = [], [], False
            words = self.policy.tokenizer.convert_ids_to_tokens(batch.token_ids[i][self.prompt_tokens :])
            while not stopped and len(ids) < sampling.max_new_tokens:
                word, probability = _drawn(self.rule(words), noise[len(ids)])
                words.append(word)
                ids.append(self.policy.tokenizer.convert_tokens_to_ids(word))
                log_probs.append(math.log(probability))
                stopped = word == "<eos>" or stop.end([ids])[0]
            row = batch.prompts[i].row
            self.generated[row] = self.generated.get(row, 0) + len(ids)
            yield Response(i, sample, ids, log_probs, "stop" if stopped else "length", self.version)


def _drawn(table: Mapping[str, float], noise: float) -> tuple[str, float]:
    for word, probability in table.items():
        if noise < probability:
            return word, probability
        noise -= probability
    return word, probability
