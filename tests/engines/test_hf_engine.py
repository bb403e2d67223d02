"""What every engine promises, held by each of `ENGINES`; `HFEngine` is compared with transformers itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FAMILIES, FamilyPolicy, make_batch, make_policy

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.engines import Engine, HFEngine, Sampling
from sppo_lightning.errors import InputError

ENGINES: dict[str, Callable[[], Engine]] = {
    "HFEngine": HFEngine,
    "HFEngine in small waves": lambda: HFEngine(max_rows=3, compact_below=1.0),
    "HFEngine that drops no row": lambda: HFEngine(compact_below=0.0),
}
TEXTS = ["1 + 2 =", "9 - 4 = ; a b c", "2", "a + b - c", "7 - 7 = 0 ; 1 +", "8 8", "4 ; 4 ; 4", "q r s t u"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param]()


def sample(engine: Engine, policy: Any, batch: PromptBatch | None = None, **sampling: Any) -> Rollouts:
    engine.update_weights(policy, 7)
    return engine.generate(
        make_batch(policy, TEXTS) if batch is None else batch, Sampling(**{"max_new_tokens": 12} | sampling)
    )


def ids(rollouts: Rollouts) -> list[list[int]]:
    """The responses, without padding."""
    lengths = rollouts.response_mask.sum(1).long().tolist()
    return [row[:length] for row, length in zip(rollouts.response_ids.tolist(), lengths, strict=True)]


def stopping_policy(*eos: int) -> Any:
    """A policy that stops now and then: `eos` ends a response besides the tokenizer's `<eos>`."""
    policy = make_policy()
    policy.model.generation_config.eos_token_id = [1, *eos]
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_generate(engine: Engine, family: str):
    policy = FamilyPolicy(family)
    policy.model.generation_config.eos_token_id = [1, 5, 9]
    rollouts = sample(engine, policy, temperature=0.0)
    pad, width = policy.tokenizer.pad_token_id, rollouts.prompt_ids.shape[1]
    out = policy.model.generate(
        input_ids=rollouts.prompt_ids,
        attention_mask=rollouts.prompt_mask.long(),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=pad,
    )[:, width:]
    expected = []
    for row in out.tolist():
        ends = [t for t, token in enumerate(row) if token in (1, 5, 9)]
        expected.append(row[: ends[0] + 1] if ends else row)
    assert ids(rollouts) == expected
    assert len({tuple(row) for row in expected}) > 2  # or the test would say little
    for row, reason in zip(expected, rollouts.finish_reasons, strict=True):
        assert reason == ("stop" if row[-1] in (1, 5, 9) else "length")


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2", "cohere"])
def test_log_probs_are_those_of_the_policys_forward(engine: Engine, family: str, temperature: float):
    policy = FamilyPolicy(family)
    policy.model.generation_config.eos_token_id = [1, 5, 9, 13]
    rollouts = sample(engine, policy, temperature=temperature, samples_per_prompt=3)
    assert len({int(n) for n in rollouts.response_mask.sum(1)}) > 2  # ragged
    with torch.no_grad():
        log_probs, _ = policy(rollouts)
    torch.testing.assert_close(rollouts.sampled_log_probs, log_probs, atol=1e-5, rtol=1e-5)


def test_rows_come_prompt_by_prompt(engine: Engine):
    policy = make_policy()
    batch = make_batch(policy, TEXTS)
    rollouts = sample(engine, policy, batch, samples_per_prompt=2, temperature=0.7)
    assert rollouts.prompt_index.tolist() == [i for i in range(8) for _ in range(2)]
    assert [p.text for p in rollouts.prompts] == [text for text in TEXTS for _ in range(2)]
    for row, (prompt, mask) in enumerate(zip(rollouts.prompt_ids, rollouts.prompt_mask, strict=True)):
        own = batch.token_ids[row // 2]
        assert prompt[-len(own) :].tolist() == own
        assert mask.tolist() == [0.0] * (len(prompt) - len(own)) + [1.0] * len(own)
    assert rollouts.responses == policy.tokenizer.batch_decode(ids(rollouts), skip_special_tokens=True)
    assert (rollouts.temperature, rollouts.policy_version) == (0.7, 7)
    off = rollouts.response_mask == 0
    assert not rollouts.sampled_log_probs[off].any()


def test_every_end_of_sequence_id_stops_and_is_part_of_the_response(engine: Engine):
    rollouts = sample(engine, stopping_policy(5, 9), samples_per_prompt=8, max_new_tokens=20)
    responses = ids(rollouts)
    for row, reason in zip(responses, rollouts.finish_reasons, strict=True):
        assert not {1, 5, 9} & set(row[:-1])
        assert (row[-1] in (1, 5, 9)) == (reason == "stop")
        assert reason == "stop" or len(row) == 20
    assert {row[-1] for row in responses} >= {1, 5, 9}


def test_an_end_of_sequence_as_the_last_token_allowed_is_a_stop(engine: Engine):
    policy = stopping_policy(5, 9)
    long = ids(sample(engine, policy, max_new_tokens=30))
    lengths = [len(row) for row in long if row[-1] in (1, 5, 9)]
    assert lengths
    for limit in sorted(set(lengths)):
        rollouts = sample(engine, policy, max_new_tokens=limit)
        assert ids(rollouts) == [row[:limit] for row in long]
        expected = ["stop" if len(row) <= limit and row[-1] in (1, 5, 9) else "length" for row in long]
        assert rollouts.finish_reasons == expected


def test_a_response_does_not_depend_on_who_else_is_in_the_batch(engine: Engine):
    policy = stopping_policy(5, 9)
    whole = sample(engine, policy, samples_per_prompt=2)
    expected, log_probs = ids(whole), whole.sampled_log_probs
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    batch = make_batch(policy, TEXTS)
    shuffled = PromptBatch([batch.prompts[i] for i in order], [batch.token_ids[i] for i in order], [0] * 8)
    rollouts = sample(engine, policy, shuffled, samples_per_prompt=2)
    rows = [2 * i + s for i in order for s in range(2)]
    assert ids(rollouts) == [expected[i] for i in rows]
    torch.testing.assert_close(rollouts.sampled_log_probs, log_probs[rows], atol=1e-5, rtol=1e-5)
    for i in (1, 4):
        alone = PromptBatch([batch.prompts[i]], [batch.token_ids[i]], [0])
        assert ids(sample(engine, policy, alone, samples_per_prompt=2)) == expected[2 * i : 2 * i + 2]


@pytest.mark.parametrize("max_rows", [1, 2, 5, 100])
@pytest.mark.parametrize("compact_below", [0.0, 0.5, 1.0])
def test_waves_and_dropped_rows_change_nothing(max_rows: int, compact_below: float):
    policy = stopping_policy(5, 9)
    expected = sample(HFEngine(), policy, samples_per_prompt=3)
    rollouts = sample(HFEngine(max_rows, compact_below), policy, samples_per_prompt=3)
    assert ids(rollouts) == ids(expected)
    torch.testing.assert_close(rollouts.sampled_log_probs, expected.sampled_log_probs, atol=1e-5, rtol=1e-5)
    assert rollouts.finish_reasons == expected.finish_reasons


def test_visit_sample_and_seed_change_the_response(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    policy = make_policy()
    batch = make_batch(policy, TEXTS)
    first = ids(sample(engine, policy, batch, samples_per_prompt=2))
    assert first == ids(sample(engine, policy, batch, samples_per_prompt=2))
    assert all(a != b for a, b in zip(first[::2], first[1::2], strict=True))
    assert first[::2] == ids(sample(engine, policy, batch))  # a sample is the same however many there are
    batch.visits = [1, *batch.visits[1:]]
    second = ids(sample(engine, policy, batch))
    assert second[0] != first[0]
    assert second[1:] == first[2::2]
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert all(a != b for a, b in zip(ids(sample(engine, policy, batch)), second, strict=True))


def test_responses_follow_the_weights(engine: Engine):
    policy, other = make_policy(), make_policy(seed=5)
    before = ids(sample(engine, policy))
    policy.load_state_dict(other.state_dict())
    after = sample(engine, policy)
    assert ids(after) != before
    assert ids(after) == ids(sample(HFEngine(), other))


def test_one_token(engine: Engine):
    rollouts = sample(engine, stopping_policy(*range(3, 20)), max_new_tokens=1)
    assert rollouts.response_ids.shape == (8, 1)
    assert rollouts.finish_reasons == [
        "stop" if row[0] in {1, *range(3, 20)} else "length" for row in ids(rollouts)
    ]
    assert set(rollouts.finish_reasons) == {"stop", "length"}


def test_a_very_long_prompt_among_short_ones(engine: Engine):
    policy = make_policy()
    long = "1 + " * 100
    batch = make_batch(policy, [*TEXTS, long])
    with_long = ids(sample(engine, policy, batch))
    assert with_long[:8] == ids(sample(engine, policy))
    alone = PromptBatch([batch.prompts[8]], [batch.token_ids[8]], [0])
    assert with_long[8:] == ids(sample(engine, policy, alone))


def test_no_prompts(engine: Engine):
    policy = make_policy()
    rollouts = sample(engine, policy, PromptBatch([], [], []))
    assert (len(rollouts), rollouts.responses, rollouts.finish_reasons) == (0, [], [])
    assert rollouts.rewards.shape == rollouts.prompt_index.shape == (0,)
    assert rollouts.response_mask.shape == rollouts.sampled_log_probs.shape == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_numbers_are_exact_whatever_the_default_dtype_is(engine: Engine, dtype: torch.dtype):
    """Lightning's `bf16-true` and `64-true` change the default, and bfloat16 cannot count to 257."""
    policy = make_policy(max_tokens=600).to(dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        rollouts = sample(engine, policy, make_batch(policy, ["1 " * 257, "2"]))
    finally:
        torch.set_default_dtype(before)
    assert rollouts.prompt_mask.sum(1).tolist() == [257, 1]
    wide = torch.promote_types(dtype, torch.float32)
    assert rollouts.sampled_log_probs.dtype == wide
    if dtype == torch.float64:
        torch.testing.assert_close(rollouts.sampled_log_probs, policy(rollouts)[0], atol=1e-12, rtol=1e-10)


def test_an_engine_without_rows():
    with pytest.raises(InputError) as raised:
        HFEngine(max_rows=0)
    assert str(raised.value) == "`max_rows`=0 of HFEngine leaves nothing to decode; use 1 or more."
