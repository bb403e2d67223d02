"""PagedEngine keeps the contract, draws what HFEngine draws, and leaves nothing behind."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import TEXTS, EngineContract, ids, sample
from forked import on_ranks
from tiny import FAMILIES, FamilyPolicy, make_batch, make_policy
from training import check_versions, check_watched, train_sharded

from sppo_lightning.engines import Engine, HFEngine, PagedEngine, Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.models import LoRA

UNKNOWN = ("llama4_text", "bert")  # to transformers' continuous batching


@pytest.fixture
def engine() -> Engine:
    return PagedEngine(page_size=8)


@pytest.mark.slow  # each sampling takes most of a second to begin and to end
class TestPagedEngine(EngineContract):
    pass


@pytest.mark.parametrize(
    ("family", "settings"),
    [(family, {"max_rows": 5}) for family in FAMILIES if family not in UNKNOWN]
    + [("mistral", {"max_tokens": 90, "prefill_tokens": 16}), ("gemma2", {"page_size": 4})],
)
def test_responses_are_those_of_hf_engine(family: str, settings: dict[str, Any]):
    policy = FamilyPolicy(family)
    policy.model.generation_config.eos_token_id = [1, 5, 9]
    expected = sample(HFEngine(), policy, temperature=0.7, samples_per_prompt=3)
    actual = sample(PagedEngine(**{"page_size": 8} | settings), policy, temperature=0.7, samples_per_prompt=3)
    assert ids(actual) == ids(expected)
    assert actual.finish_reasons == expected.finish_reasons
    torch.testing.assert_close(actual.sampled_log_probs, expected.sampled_log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 1])
def test_training_samples_from_the_updated_weights(engine: Engine, prefetch: int):
    check_versions(engine, prefetch, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HFEngine, PagedEngine])
def test_every_rank_has_all_of_a_sharded_policy(tmp_path: Path, kind: type[Engine]):
    for watches in on_ranks(2, tmp_path, train_sharded, kind):
        check_watched(watches, 0, 1e-4)


@pytest.mark.parametrize("family", UNKNOWN)
def test_an_architecture_that_transformers_cannot_page(engine: Engine, family: str):
    policy = FamilyPolicy(family)
    with pytest.raises(InputError) as raised:
        sample(engine, policy)
    assert f"`engine`=PagedEngine does not work with {type(policy.model).__name__}" in str(raised.value)
    assert str(raised.value).endswith("use sppo_lightning.engines.HFEngine.")


def test_a_policy_with_adapters_is_sampled_with_them():
    policy = make_policy(lora=LoRA(rank=2))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    assert ids(sample(PagedEngine(page_size=8), policy)) == ids(sample(HFEngine(), policy))


@pytest.mark.slow
def test_the_policys_own_model_is_left_alone(engine: Engine):
    """Its attention is that of the update, and changes of its weights are not seen before they are handed over."""
    policy = make_policy()
    before, attention = ids(sample(engine, policy)), policy.model.config._attn_implementation
    for parameter in policy.parameters():
        parameter.data.mul_(0.5)
    assert ids(engine.generate(make_batch(policy, TEXTS), Sampling(max_new_tokens=12))) == before
    assert ids(sample(engine, policy)) == ids(sample(HFEngine(), policy)) != before
    assert policy.model.config._attn_implementation == attention


def test_under_mixed_precision_the_copy_is_in_bf16(engine: Engine):
    policy = make_policy()
    with torch.autocast("cpu", torch.bfloat16):
        rollouts = sample(engine, policy)
        own = policy(rollouts)[0].detach()
    assert engine._model.dtype == torch.bfloat16  # type: ignore[attr-defined]
    torch.testing.assert_close(rollouts.sampled_log_probs, own, atol=0.3, rtol=0.1)


@pytest.mark.slow
def test_a_reader_who_stops_and_an_engine_that_is_closed(engine: Engine):
    policy, threads = make_policy(), threading.active_count()
    engine.update_weights(policy, 0)
    stream = engine.stream(make_batch(policy, TEXTS), Sampling(max_new_tokens=100))
    next(stream)
    stream.close()
    assert threading.active_count() == threads
    engine.close()
    expected = ids(sample(HFEngine(), policy))
    assert ids(engine.generate(make_batch(policy, TEXTS), Sampling(max_new_tokens=12))) == expected


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_rows": 0}, "`max_rows`=0 of PagedEngine leaves nothing to decode; use 1 or more."),
        ({"page_size": 2}, "`page_size`=2 of PagedEngine is too small; use 4 or more."),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, int], sentence: str):
    with pytest.raises(InputError) as raised:
        PagedEngine(**settings)
    assert str(raised.value) == sentence
