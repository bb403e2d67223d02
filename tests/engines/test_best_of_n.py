"""The best of several independent samples."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from contract import TEXTS, EngineContract, MakePolicy, ids, sample
from table_engine import TableEngine
from tiny import make_batch, make_policy

from sppo_lightning.engines import BestOfN, Engine, HFEngine, Sampling
from sppo_lightning.errors import InputError


class TestBestOfN(EngineContract):
    """Where no response is better than another, the first of the `n` are what the engine within gives."""

    alike = 1  # with the noise of its requests, a response of two tokens comes twice

    @pytest.fixture
    def engine(self) -> Engine:
        search = BestOfN(HFEngine(), n=8)
        search.judge = lambda prompts, responses: [0.0] * len(responses)
        return search

    def test_a_prompts_second_response_without_its_first(self, engine: Engine, policy_of: MakePolicy):
        """It is the best of other samples than the first's."""
        policy, behind = policy_of(), make_batch(policy_of(), TEXTS)
        behind.first_samples = [1] * len(behind)
        assert self.differ(ids(sample(engine, policy, behind)), ids(sample(engine, policy)))


def coin(words: list[str]) -> Mapping[str, float]:
    """Three tokens: one response in four begins with `a`."""
    return {"a": 0.25, "b": 0.75} if not words else {"c": 1.0} if len(words) == 1 else {"<eos>": 1.0}


@pytest.fixture(scope="module")
def policy() -> Any:
    return make_policy()


def best_of(policy: Any, judge: Any, **settings: Any) -> BestOfN:
    search = BestOfN(TableEngine(coin, 2), **settings)
    search.judge = judge
    search.update_weights(policy, 0)
    return search


def is_a(prompts: Any, responses: list[str]) -> list[float]:
    return [float(response.startswith("a")) for response in responses]


def test_the_best_comes_first_with_its_density(policy: Any):
    batch = make_batch(policy, ["1 ="] * 12)
    for found in best_of(policy, is_a, n=8).search(batch, Sampling(max_new_tokens=5)):
        scores = [candidate.score for candidate in found.candidates]
        assert scores == sorted(scores, reverse=True)
        assert (len(scores), found.tokens, found.solved) == (8, 24, scores[0] == 1.0)
        if found.solved:  # of density π(y) / P(success), P being the share
            assert found.candidates[0].log_excess == pytest.approx(math.log(8 / sum(scores)))
            assert found.candidates[0].response.log_probs[0] == pytest.approx(math.log(0.25))
        assert found.candidates[-1].score == 1.0 or found.candidates[-1].log_excess == 0.0


def test_rounds_end_with_a_success_or_the_budget(policy: Any):
    batch = make_batch(policy, ["1 ="] * 12)
    found = best_of(policy, is_a, n=8, at_once=3).search(batch, Sampling(max_new_tokens=5))
    for each in found:
        drawn = len(each.candidates)
        assert drawn in (3, 6, 8)
        assert each.tokens == 3 * drawn
        assert each.solved or drawn == 8
    assert len({len(each.candidates) for each in found}) > 1
    # a round of 3 may need 15 tokens: 9 are used by the first, 18 by the second, and 18 + 15 is too much
    bounded = best_of(policy, lambda p, r: [0.0] * len(r), n=99, at_once=3, budget_tokens=32)
    assert [each.tokens for each in bounded.search(batch, Sampling(max_new_tokens=5))] == [18] * 12


def test_responses_without_a_verdict_are_left_out(policy: Any):
    judge: Any = lambda prompts, responses: [None, 0.5, math.nan, 0.25] * len(prompts[::4])  # noqa: E731
    [found] = best_of(policy, judge, n=4).search(make_batch(policy, ["1 ="]), Sampling(max_new_tokens=5))
    assert [candidate.score for candidate in found.candidates] == [0.5, 0.25]
    assert [candidate.log_excess for candidate in found.candidates] == [math.log(2), 0.0]


def test_a_real_engine_gives_the_best_of_its_samples(policy: Any):
    search = BestOfN(HFEngine(), n=6)
    search.judge = lambda prompts, responses: [response.count("a") / 20 for response in responses]
    search.update_weights(policy, 0)
    batch, sampling = make_batch(policy, TEXTS), Sampling(max_new_tokens=10)
    found = search.search(batch, sampling)
    assert ids(search.generate(batch, sampling)) == [each.candidates[0].response.token_ids for each in found]
    for each in found:
        texts = [policy.tokenizer.decode(c.response.token_ids, skip_special_tokens=True) for c in each.candidates]
        assert [c.score for c in each.candidates] == sorted((t.count("a") / 20 for t in texts), reverse=True)
        assert len({tuple(c.response.token_ids) for c in each.candidates}) > 1
        assert len(texts) == 6


def test_settings_that_cannot_be_used():
    with pytest.raises(InputError, match="`n`=0 of BestOfN"):
        BestOfN(HFEngine(), n=0)
