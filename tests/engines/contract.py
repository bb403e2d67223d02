"""What every engine promises: a class of tests that each engine's own test file inherits."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_batch, make_policy
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.engines import Engine, Sampling

TEXTS = ["1 + 2 =", "9 - 4 = ; a b c", "2", "a + b - c", "7 - 7 = 0 ; 1 +", "8 8", "4 ; 4 ; 4", "q r s t u"]
MakePolicy = Callable[..., Any]  # (seed) to a policy of the vocabulary in tests/tiny.py


def sample(engine: Engine, policy: Any, batch: PromptBatch | None = None, **sampling: Any) -> Rollouts:
    engine.update_weights(policy, 7)
    return engine.generate(
        make_batch(policy, TEXTS) if batch is None else batch, Sampling(**{"max_new_tokens": 12} | sampling)
    )


def ids(rollouts: Rollouts) -> list[list[int]]:
    """The responses, without padding."""
    lengths = rollouts.response_mask.sum(1).long().tolist()
    return [row[:length] for row, length in zip(rollouts.response_ids.tolist(), lengths, strict=True)]


def greedy_by_transformers(policy: Any, rollouts: Rollouts, tokens: int, eos: tuple[int, ...]) -> list[list[int]]:
    """What `generate()` gives the prompts of `rollouts`, cut after the first id in `eos`."""
    out = policy.model.generate(
        input_ids=rollouts.prompt_ids,
        attention_mask=rollouts.prompt_mask.long(),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=policy.tokenizer.pad_token_id,
    )[:, rollouts.prompt_ids.shape[1] :]
    rows = []
    for row in out.tolist():
        ends = [t for t, token in enumerate(row) if token in eos]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


class EngineContract:
    """Inherit it, and give it a fixture `engine`; `policy_of` and `atol` where the engine needs others."""

    atol = 1e-5  # of log-probabilities against the trainer's own
    alike = 0  # pairs of a batch's responses that are the same by chance, though their noise is not

    @pytest.fixture
    def policy_of(self) -> MakePolicy:
        return make_policy

    @pytest.fixture
    def stopping(self, policy_of: MakePolicy) -> MakePolicy:
        """A policy that stops now and then: the ids given end a response besides the tokenizer's `<eos>`."""

        def make(*eos: int) -> Any:
            policy = policy_of()
            policy.model.generation_config.eos_token_id = [1, *eos]
            return policy

        return make

    def close(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual, expected, atol=self.atol, rtol=self.atol)

    def differ(self, some: list[list[int]], others: list[list[int]]) -> bool:
        return sum(a == b for a, b in zip(some, others, strict=True)) <= self.alike

    def test_greedy_is_transformers_generate(self, engine: Engine, stopping: MakePolicy):
        policy = stopping(5, 9)
        rollouts = sample(engine, policy, temperature=0.0)
        expected = greedy_by_transformers(policy, rollouts, 12, (1, 5, 9))
        assert ids(rollouts) == expected
        assert len({tuple(row) for row in expected}) > 2  # or the test would say little

    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    def test_log_probs_are_those_of_the_policys_forward(
        self, engine: Engine, stopping: MakePolicy, temperature: float
    ):
        policy = stopping(5, 9, 13)
        rollouts = sample(engine, policy, temperature=temperature, samples_per_prompt=3)
        assert len({int(n) for n in rollouts.response_mask.sum(1)}) > 2  # ragged
        with torch.no_grad():
            self.close(rollouts.sampled_log_probs, policy(rollouts)[0])

    @pytest.mark.parametrize(
        ("cut", "warpers"),
        [
            ({"top_k": 3}, [TopKLogitsWarper(3)]),
            ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
            ({"min_p": 0.3}, [MinPLogitsWarper(0.3)]),
            ({"top_k": 4, "top_p": 0.8}, [TopKLogitsWarper(4), TopPLogitsWarper(0.8)]),
        ],
        ids=["top_k", "top_p", "min_p", "top_k and top_p"],
    )
    def test_log_probs_are_of_the_truncated_distribution(
        self, engine: Engine, policy_of: MakePolicy, cut: dict[str, Any], warpers: list[LogitsProcessor]
    ):
        policy = policy_of()
        rollouts = sample(engine, policy, temperature=0.8, samples_per_prompt=4, max_new_tokens=6, **cut)
        for row, response in enumerate(ids(rollouts)):
            prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row] > 0].tolist()
            with torch.no_grad():
                logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.8
            for warper in warpers:
                logits = warper(torch.tensor([[]]), logits)  # type: ignore[arg-type]
            expected = logits.log_softmax(-1)[torch.arange(len(response)), response]
            assert expected.isfinite().all()  # nothing was drawn that is cut off
            self.close(rollouts.sampled_log_probs[row, : len(response)], expected)

    def test_random_states_are_left_alone(self, engine: Engine, policy_of: MakePolicy):
        """Or a run would depend on its engine, and a resumed one would not be the same."""
        policy = policy_of()

        def states() -> list[str]:
            return [str(torch.get_rng_state().tolist()), str(np.random.get_state()), str(random.getstate())]

        before = states()
        sample(engine, policy, temperature=0.7)
        sample(engine, policy, temperature=0.7)
        assert states() == before

    def test_rows_come_prompt_by_prompt(self, engine: Engine, policy_of: MakePolicy):
        policy = policy_of()
        batch = make_batch(policy, TEXTS)
        rollouts = sample(engine, policy, batch, samples_per_prompt=2, temperature=0.7)
        assert rollouts.prompt_index.tolist() == [i for i in range(8) for _ in range(2)]
        assert [p.text for p in rollouts.prompts] == [text for text in TEXTS for _ in range(2)]
        for row, (prompt, mask) in enumerate(zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)):
            own = batch.token_ids[row // 2]
            assert prompt[-len(own) :].tolist() == own
            assert mask.tolist() == [0.0] * (len(prompt) - len(own)) + [1.0] * len(own)
        assert rollouts.responses == policy.tokenizer.batch_decode(ids(rollouts), skip_special_tokens=True)
        assert (rollouts.temperature, rollouts.policy_versions.tolist()) == (0.7, [7] * 16)
        off = rollouts.response_mask == 0
        assert not rollouts.sampled_log_probs[off].any()

    def test_responses_are_yielded_as_they_finish(self, engine: Engine, stopping: MakePolicy):
        policy = stopping(5, 9)
        engine.update_weights(policy, 3)
        batch, sampling = make_batch(policy, TEXTS), Sampling(max_new_tokens=40, samples_per_prompt=3)
        responses = list(engine.stream(batch, sampling))
        assert sorted((r.prompt_index, r.sample) for r in responses) == [(i, s) for i in range(8) for s in range(3)]
        assert {r.policy_version for r in responses} == {3}
        whole = engine.generate(batch, sampling)
        assert {(r.prompt_index, r.sample): r.token_ids for r in responses} == {
            (i // 3, i % 3): row for i, row in enumerate(ids(whole))
        }
        assert len(responses[0].token_ids) < max(len(r.token_ids) for r in responses)

    def test_every_end_of_sequence_id_stops_and_is_part_of_the_response(self, engine: Engine, stopping: MakePolicy):
        rollouts = sample(engine, stopping(5, 9), samples_per_prompt=8, max_new_tokens=20)
        responses = ids(rollouts)
        for row, reason in zip(responses, rollouts.finish_reasons, strict=True):
            assert not {1, 5, 9} & set(row[:-1])
            assert (row[-1] in (1, 5, 9)) == (reason == "stop")
            assert reason == "stop" or len(row) == 20
        assert {row[-1] for row in responses} >= {1, 5, 9}

    def test_an_end_of_sequence_as_the_last_token_allowed_is_a_stop(self, engine: Engine, stopping: MakePolicy):
        policy = stopping(5, 9)
        long = ids(sample(engine, policy, max_new_tokens=30))
        lengths = [len(row) for row in long if row[-1] in (1, 5, 9)]
        assert lengths
        for limit in sorted(set(lengths)):
            rollouts = sample(engine, policy, max_new_tokens=limit)
            assert ids(rollouts) == [row[:limit] for row in long]
            expected = ["stop" if len(row) <= limit and row[-1] in (1, 5, 9) else "length" for row in long]
            assert rollouts.finish_reasons == expected

    def test_stop_strings(self, engine: Engine, policy_of: MakePolicy):
        """The token that completes a stop string is the last; one may span several tokens."""
        policy = policy_of()
        free = ids(sample(engine, policy, samples_per_prompt=6, max_new_tokens=20))
        decode = partial(policy.tokenizer.decode, skip_special_tokens=True)
        texts = [decode(row) for row in free]
        pairs = [text.split()[i : i + 2] for text in texts for i in range(4, 8) if len(text.split()) > 9]
        stop = (" ".join(pairs[0]), " ".join(pairs[-1]))
        rollouts = sample(engine, policy, samples_per_prompt=6, max_new_tokens=20, stop=stop)
        stopped = 0
        for row, text, reason, whole in zip(
            ids(rollouts), rollouts.responses, rollouts.finish_reasons, free, strict=True
        ):
            assert row == whole[: len(row)]
            ends = [n for n in range(1, len(whole) + 1) if any(s in decode(whole[:n]) for s in stop)]
            assert len(row) == (ends[0] if ends else len(whole))
            if ends:
                stopped += 1
                assert reason == "stop"
                assert text.endswith(stop)
        assert stopped >= 2
        assert stopped < len(free)

    def test_a_response_does_not_depend_on_who_else_is_in_the_batch(self, engine: Engine, stopping: MakePolicy):
        policy = stopping(5, 9)
        whole = sample(engine, policy, samples_per_prompt=2)
        expected, log_probs = ids(whole), whole.sampled_log_probs
        order = [5, 2, 7, 0, 1, 6, 3, 4]
        batch = make_batch(policy, TEXTS)
        shuffled = PromptBatch([batch.prompts[i] for i in order], [batch.token_ids[i] for i in order], [0] * 8)
        rollouts = sample(engine, policy, shuffled, samples_per_prompt=2)
        rows = [2 * i + s for i in order for s in range(2)]
        assert ids(rollouts) == [expected[i] for i in rows]
        self.close(rollouts.sampled_log_probs, log_probs[rows])
        for i in (1, 4):
            alone = PromptBatch([batch.prompts[i]], [batch.token_ids[i]], [0])
            assert ids(sample(engine, policy, alone, samples_per_prompt=2)) == expected[2 * i : 2 * i + 2]

    def test_visit_sample_and_seed_change_the_response(
        self, engine: Engine, policy_of: MakePolicy, monkeypatch: pytest.MonkeyPatch
    ):
        policy = policy_of()
        batch = make_batch(policy, TEXTS)
        first = ids(sample(engine, policy, batch, samples_per_prompt=2))
        assert first == ids(sample(engine, policy, batch, samples_per_prompt=2))
        assert self.differ(first[::2], first[1::2])
        assert first[::2] == ids(sample(engine, policy, batch))  # a sample is the same however many there are
        batch.visits = [1, *batch.visits[1:]]
        second = ids(sample(engine, policy, batch))
        assert second[0] != first[0]
        assert second[1:] == first[2::2]
        monkeypatch.setenv("PL_GLOBAL_SEED", "1")
        assert self.differ(ids(sample(engine, policy, batch)), second)

    def test_a_prompts_second_response_without_its_first(self, engine: Engine, policy_of: MakePolicy):
        policy = policy_of()
        first = ids(sample(engine, policy, samples_per_prompt=2))
        behind = make_batch(policy, TEXTS)
        behind.first_samples = [1] * len(behind)
        assert ids(sample(engine, policy, behind)) == first[1::2]

    def test_responses_follow_the_weights(self, engine: Engine, policy_of: MakePolicy):
        policy, other = policy_of(), policy_of(seed=5)
        before = ids(sample(engine, policy))
        expected = ids(sample(engine, other))
        policy.load_state_dict(other.state_dict())
        after = sample(engine, policy)
        assert ids(after) == expected
        assert expected != before
        with torch.no_grad():
            self.close(after.sampled_log_probs, other(after)[0])

    def test_one_token(self, engine: Engine, stopping: MakePolicy):
        rollouts = sample(engine, stopping(*range(3, 20)), max_new_tokens=1)
        assert rollouts.response_ids.shape == (8, 1)
        assert rollouts.finish_reasons == [
            "stop" if row[0] in {1, *range(3, 20)} else "length" for row in ids(rollouts)
        ]
        assert set(rollouts.finish_reasons) == {"stop", "length"}

    def test_a_very_long_prompt_among_short_ones(self, engine: Engine, policy_of: MakePolicy):
        policy = policy_of()
        long = "1 + " * 100
        batch = make_batch(policy, [*TEXTS, long])
        with_long = ids(sample(engine, policy, batch))
        assert with_long[:8] == ids(sample(engine, policy))
        alone = PromptBatch([batch.prompts[8]], [batch.token_ids[8]], [0])
        assert with_long[8:] == ids(sample(engine, policy, alone))

    def test_no_prompts(self, engine: Engine, policy_of: MakePolicy):
        policy = policy_of()
        rollouts = sample(engine, policy, PromptBatch([], [], []))
        assert (len(rollouts), rollouts.responses, rollouts.finish_reasons) == (0, [], [])
        assert rollouts.rewards.shape == rollouts.prompt_index.shape == (0,)
        assert rollouts.response_mask.shape == rollouts.sampled_log_probs.shape == (0, 0)
