"""HFEngine keeps the contract, with every family of models, and whoever is decoded together."""

import gc

import pytest
import torch
from contract import EngineContract, greedy_by_transformers, ids, sample
from tiny import FAMILIES, FamilyPolicy, make_batch, make_policy

from sppo_lightning.engines import Engine, HFEngine
from sppo_lightning.engines.slots import SlotCache
from sppo_lightning.errors import InputError

SETTINGS = {
    "by default": {},
    "with few rows": {"max_rows": 3},
    "with few tokens": {"max_tokens": 90, "prefill_tokens": 16},
    "with fixed shapes": {"cuda_graphs": True, "max_rows": 7},  # which are not recorded on a CPU
}


@pytest.fixture(params=SETTINGS)
def engine(request: pytest.FixtureRequest) -> Engine:
    return HFEngine(**SETTINGS[request.param])


class TestHFEngine(EngineContract):
    pass


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_generate(engine: Engine, family: str):
    policy = FamilyPolicy(family)
    policy.model.generation_config.eos_token_id = [1, 5, 9]
    rollouts = sample(engine, policy, temperature=0.0)
    expected = greedy_by_transformers(policy, rollouts, 12, (1, 5, 9))
    assert ids(rollouts) == expected
    assert len({tuple(row) for row in expected}) > 2  # or the test would say little
    for row, reason in zip(expected, rollouts.finish_reasons, strict=True):
        assert reason == ("stop" if row[-1] in (1, 5, 9) else "length")


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_policys_forward(engine: Engine, family: str):
    policy = FamilyPolicy(family)
    policy.model.generation_config.eos_token_id = [1, 5, 9, 13]
    rollouts = sample(engine, policy, temperature=0.7, samples_per_prompt=3)
    with torch.no_grad():
        torch.testing.assert_close(rollouts.sampled_log_probs, policy(rollouts)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_rows", [1, 2, 5, 100])
@pytest.mark.parametrize("prefill_tokens", [1, 20])
def test_who_is_decoded_together_changes_nothing(max_rows: int, prefill_tokens: int):
    policy = make_policy()
    policy.model.generation_config.eos_token_id = [1, 5, 9]
    expected = sample(HFEngine(), policy, samples_per_prompt=3)
    engine = HFEngine(max_rows, prefill_tokens=prefill_tokens)
    rollouts = sample(engine, policy, samples_per_prompt=3)
    assert ids(rollouts) == ids(expected)
    torch.testing.assert_close(rollouts.sampled_log_probs, expected.sampled_log_probs, atol=1e-5, rtol=1e-5)
    assert rollouts.finish_reasons == expected.finish_reasons


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
    assert not torch.equal(rollouts.sampled_log_probs, rollouts.sampled_log_probs.bfloat16().to(wide))
    if dtype == torch.float64:
        torch.testing.assert_close(rollouts.sampled_log_probs, policy(rollouts)[0], atol=1e-12, rtol=1e-10)


def test_keys_and_values_are_gone_when_the_responses_are_there():
    """They are an iteration's largest tensors, and Python may look for cycles only iterations later."""
    policy = make_policy()
    gc.collect()
    gc.disable()
    try:
        sample(HFEngine(), policy)
        kept = [thing for thing in gc.get_objects() if type(thing) is SlotCache]
    finally:
        gc.enable()
    assert kept == []


def test_an_engine_without_rows():
    with pytest.raises(InputError) as raised:
        HFEngine(max_rows=0)
    assert str(raised.value) == "`max_rows`=0 of HFEngine leaves nothing to decode; use 1 or more."
