"""Tree search over a policy that is a table, and over a real one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from contract import TEXTS, ids
from table_engine import TableEngine
from tiny import make_batch, make_policy

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.engines import BestOfN, HFEngine, Sampling, TreeSearchEngine
from sppo_lightning.engines.search import Found, success_per_1k_tokens
from sppo_lightning.errors import InputError

PROMPT = "1 ="
LONG = 120  # words of a response
BUDGET = 4000


def rare_first_step(words: list[str]) -> Mapping[str, float]:
    """`b ;` begins one response in 50, and half of those succeed; all of them are long."""
    if not words:
        return {"b": 0.02, "a": 0.98}
    if len(words) == 1:
        return {";": 1.0}
    if len(words) == 2:
        return {"e": 0.5, "f": 0.5} if words[0] == "b" else {"f": 1.0}
    return {"<eos>": 1.0} if len(words) == LONG - 1 else {"d": 1.0}


def begins_with(right: str) -> Any:
    def judge(prompts: list[Prompt], responses: list[str]) -> list[float]:
        return [float(response.startswith(right)) for response in responses]

    return judge


@pytest.fixture(scope="module")
def policy() -> Any:
    return make_policy()


def tree_search(rule: Any, policy: Any, judge: Any, **settings: Any) -> TreeSearchEngine:
    chosen = {"budget_tokens": BUDGET, "branches": 32, "step_tokens": 4, "step_end": [";"]}
    search = TreeSearchEngine(TableEngine(rule, len(PROMPT.split())), **chosen | settings)
    search.judge = judge
    search.update_weights(policy, 3)
    return search


def prompts(policy: Any, count: int) -> PromptBatch:
    return make_batch(policy, [PROMPT] * count)


def summary(found: Found) -> Any:
    return found.tokens, [
        (c.response.token_ids, c.response.log_probs, c.score, c.log_excess) for c in found.candidates
    ]


def part(batch: PromptBatch, rows: Sequence[int]) -> PromptBatch:
    return PromptBatch([batch.prompts[i] for i in rows], [batch.token_ids[i] for i in rows], [0] * len(rows))


@pytest.mark.slow
def test_a_rare_first_step_is_found_where_independent_samples_miss_it(policy: Any):
    """One sample in 100 succeeds, and the budget is 33 of them: by chance 1 − 0.99³³ = 28 % of the prompts.

    Of 120 prompts that is 33.9, with a standard deviation of 4.9: within three of it from 19 to 48.
    """
    sampling, batch = Sampling(max_new_tokens=LONG + 20), prompts(policy, 120)
    search = tree_search(rare_first_step, policy, begins_with("b ; e"))
    found = search.search(part(batch, range(40)), sampling)
    alone = BestOfN(TableEngine(rare_first_step, 2), n=BUDGET // LONG, at_once=1)
    alone.judge = search.judge
    alone.update_weights(policy, 3)
    independent = alone.search(batch, sampling)
    assert 19 <= sum(each.solved for each in independent) <= 48
    assert sum(each.solved for each in found) > 20
    assert success_per_1k_tokens(found) > 2 * success_per_1k_tokens(independent)
    assert max(each.tokens for each in found) <= BUDGET
    for each in found:
        best = each.candidates[0]
        if each.solved:
            words = policy.tokenizer.convert_ids_to_tokens(best.response.token_ids)
            assert words[:3] == ["b", ";", "e"]
            assert len(words) == LONG
            assert best.response.finish_reason == "stop"
            # the policy's own: log 0.02 of `b` and log 0.5 of `e`, and nothing else was a choice
            assert best.response.log_probs == pytest.approx([math.log(0.02), 0.0, math.log(0.5)] + [0.0] * 117)
            assert best.log_excess > 1.0  # it is far likelier to be found than to be sampled


def test_the_budget_is_what_the_engine_generated_and_is_never_exceeded(policy: Any):
    for budget in (LONG, 200, 333, BUDGET):
        search = tree_search(rare_first_step, policy, begins_with("nothing"), budget_tokens=budget)
        found = search.search(prompts(policy, 3), Sampling(max_new_tokens=LONG))
        engine: Any = search.engine
        assert [each.tokens for each in found] == [engine.generated[row] for row in range(3)]
        assert all(each.tokens <= budget and each.candidates for each in found)
    assert found[0].tokens > BUDGET - 32 * 4 - LONG  # and it is used


def test_a_tree_is_the_same_whatever_else_is_in_the_batch(policy: Any, monkeypatch: pytest.MonkeyPatch):
    sampling, batch = Sampling(max_new_tokens=LONG), prompts(policy, 6)
    search = tree_search(rare_first_step, policy, begins_with("b ; e"))
    together = [summary(found) for found in search.search(batch, sampling)]
    order = [4, 1, 5]
    assert [summary(found) for found in search.search(part(batch, order), sampling)] == [together[i] for i in order]
    assert len({tuple(map(str, each)) for each in together}) == 6
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert summary(search.search(part(batch, [0]), sampling)[0]) != together[0]


def test_the_engine_gets_many_prompts_and_leaves_in_a_call(policy: Any):
    search = tree_search(rare_first_step, policy, begins_with("nothing"), leaves=6)
    search.search(prompts(policy, 10), Sampling(max_new_tokens=LONG))
    engine: Any = search.engine
    sizes = [size for size, _ in engine.calls]
    assert sizes[0] == sizes[1] == 10
    assert max(sizes) > 20
    steps = [sampling for _, sampling in engine.calls if sampling.samples_per_prompt == 32]
    assert {(s.max_new_tokens, s.stop) for s in steps} == {(4, (";",))}


def test_steps_end_with_the_token_that_completes_the_mark(policy: Any):
    def rule(words: list[str]) -> Mapping[str, float]:
        return {"a": 0.3, ";": 0.4, "b": 0.2, "<eos>": 0.1}

    search = tree_search(rule, policy, begins_with("nothing"), branches=4, budget_tokens=600)
    seen: list[list[str]] = []
    engine: Any = search.engine
    stream = engine.stream

    def watched(batch: PromptBatch, sampling: Sampling) -> Any:
        seen.extend(policy.tokenizer.convert_ids_to_tokens(row[2:]) for row in batch.token_ids)
        return stream(batch, sampling)

    engine.stream = watched
    search.search(prompts(policy, 2), Sampling(max_new_tokens=24))
    prefixes = [words for words in seen if words]
    assert len(prefixes) > 10
    for words in prefixes:  # of a response that goes on: steps that end with a mark, or are four tokens long
        since = 0
        for word in words:
            since = 0 if word == ";" or since == 3 else since + 1
        assert since == 0
        assert "<eos>" not in words


def test_a_pattern_ends_a_step_and_what_is_behind_it_is_thrown_away(policy: Any):
    def rule(words: list[str]) -> Mapping[str, float]:
        return {"a": 0.5, "b": 0.3, "<eos>": 0.2}

    search = tree_search(rule, policy, begins_with("nothing"), step_end=[], step_pattern="a (a|b)", step_tokens=6)
    engine: Any = search.engine
    prefixes: list[list[str]] = []
    stream = engine.stream

    def watched(batch: PromptBatch, sampling: Sampling) -> Any:
        prefixes.extend(policy.tokenizer.convert_ids_to_tokens(row[2:]) for row in batch.token_ids)
        return stream(batch, sampling)

    engine.stream = watched
    [found] = search.search(prompts(policy, 1), Sampling(max_new_tokens=40))
    assert found.tokens == engine.generated[0]
    assert len(kept := [words for words in prefixes if words]) > 10
    for (
        words
    ) in kept:  # of a response that goes on: each step ends with the second word from an `a` on, or is six long
        step: list[str] = []
        for word in words:
            step.append(word)
            if "a" in step[:-1] or len(step) == 6:
                step = []
        assert step == []
        assert "<eos>" not in words


def test_a_pattern_that_would_take_for_ever(policy: Any):
    search = tree_search(
        lambda words: {"a": 1.0},
        policy,
        begins_with("nothing"),
        step_pattern="((a ?)+)+;",
        step_end=[],
        step_tokens=60,
    )
    [found] = search.search(prompts(policy, 1), Sampling(max_new_tokens=100))
    assert found.candidates
    assert search._pattern_end(policy.tokenizer("a a a ;")["input_ids"]) == 4


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        (lambda words: {"<eos>": 1.0}, "empty"),
        (lambda words: {";": 1.0}, "only newlines"),
        (lambda words: {"a": 0.5, "b": 0.5}, "no newline and no end"),
        (lambda words: {";": 0.5, "<eos>": 0.5}, "newlines and an early end"),
    ],
)
def test_hostile_text(policy: Any, rule: Any, kind: str):
    search = tree_search(rule, policy, begins_with("nothing"), branches=3, budget_tokens=400)
    [found] = search.search(prompts(policy, 1), Sampling(max_new_tokens=20))
    assert 0 < found.tokens <= 400
    assert not found.solved
    for candidate in found.candidates:
        response = candidate.response
        assert 1 <= len(response.token_ids) == len(response.log_probs) <= 20
        assert (response.token_ids[-1] == 1) == (response.finish_reason == "stop")
        assert math.isfinite(candidate.log_excess)


def test_a_stop_string_that_begins_in_the_prefix(policy: Any):
    """`; e` ends a response, and the step ends at `;`: the engine alone would not see it."""

    def rule(words: list[str]) -> Mapping[str, float]:
        return [{"a": 0.9, "b": 0.1}, {";": 1.0}, {"e": 1.0}][len(words)] if len(words) < 3 else {"f": 1.0}

    search = tree_search(rule, policy, begins_with("nothing"), branches=8, budget_tokens=300)
    [found] = search.search(prompts(policy, 1), Sampling(max_new_tokens=20, stop=("; e",)))
    assert len(found.candidates) > 2
    for candidate in found.candidates:
        assert len(candidate.response.token_ids) == len(candidate.response.log_probs) == 3
        assert candidate.response.finish_reason == "stop"


def test_no_verdict_leaves_a_response_out(policy: Any):
    search = tree_search(rare_first_step, policy, lambda prompts, responses: [None] * len(responses))
    [found] = search.search(prompts(policy, 1), Sampling(max_new_tokens=LONG))
    assert (found.candidates, found.solved) == ([], False)
    assert 0 < found.tokens <= BUDGET


def test_a_real_policy(policy: Any):
    """Every candidate's log-probabilities are those of the policy's own forward over the whole response."""
    search = TreeSearchEngine(HFEngine(), budget_tokens=120, branches=3, step_tokens=4, step_end=[";", "="])
    search.judge = lambda prompts, responses: [len(set(r.split())) / 40 for r in responses]
    search.update_weights(policy, 7)
    batch, sampling = make_batch(policy, TEXTS), Sampling(max_new_tokens=16, samples_per_prompt=2)
    rollouts = search.generate(batch, sampling)
    assert rollouts.prompt_index.tolist() == [i for i in range(8) for _ in range(2)]
    assert rollouts.policy_versions.tolist() == [7] * 16
    with torch.no_grad():
        torch.testing.assert_close(rollouts.sampled_log_probs, policy(rollouts)[0], atol=1e-5, rtol=1e-5)
    found = search.search(batch, sampling)
    assert [c.response.token_ids for each in found for c in each.candidates[:2]] == ids(rollouts)
    assert all(len(each.candidates) > 3 and each.tokens <= 120 for each in found)
    alone = search.search(part(batch, [4]), sampling)
    assert [c.response.token_ids for c in alone[0].candidates] == [
        c.response.token_ids for c in found[4].candidates
    ]
    assert len(search.generate(PromptBatch([], [], []), sampling)) == 0
    assert batch.prompts == make_batch(policy, TEXTS).prompts


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"branches": 0}, "`branches`=0"),
        ({"widening": 2.0}, "`widening`=2.0"),
        ({"step_end": ""}, "`step_end`=''"),
        ({"step_end": [""]}, "`step_end`"),
        ({"exploration": math.nan}, "`exploration`=nan"),
        ({"step_pattern": "(a"}, "is no regular expression"),
        ({"step_pattern": "a*"}, "matches no text at all"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], named: str):
    with pytest.raises(InputError, match=named.replace("[", r"\[")):
        TreeSearchEngine(HFEngine(), **settings)


def test_what_is_missing_is_named(policy: Any):
    search = tree_search(rare_first_step, policy, None)
    with pytest.raises(InputError, match="has no judge"):
        search.search(prompts(policy, 1), Sampling(max_new_tokens=LONG))
    with pytest.raises(InputError, match="no room for one response"):
        search.search(prompts(policy, 1), Sampling(max_new_tokens=BUDGET + 1))
    with pytest.raises(InputError, match="is a search itself"):
        BestOfN(search)
