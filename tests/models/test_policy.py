"""The policy's log-probabilities against transformers' own logits, family by family."""

import copy
from typing import Any

import pytest
import torch
from tiny import FAMILIES, WORDS, FamilyPolicy, family_config, make_batch, make_policy

from sppo_lightning.batch import Rollouts
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.tiny import word_tokenizer

PAIRS = {"1 + 2 =": "3 <eos>", "9 - 4 = ; a b c": "5 5 5 5 5", "2": "7 8 9 a b c d e <eos>", "a b": "<eos>"}


def rollouts_of(policy: Any, temperature: float) -> Rollouts:
    ids = [policy.tokenizer(text)["input_ids"] for text in PAIRS.values()]
    return pack_rollouts(
        make_batch(policy, list(PAIRS)),
        list(range(len(PAIRS))),
        ids,
        [[0.0] * len(row) for row in ids],
        ["stop"] * len(PAIRS),
        policy=policy,
        temperature=temperature,
        versions=[0] * len(PAIRS),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits(family: str, temperature: float):
    policy = FamilyPolicy(family)
    log_probs, entropy = policy(rollouts_of(policy, temperature))
    for row, (prompt, response) in enumerate(PAIRS.items()):
        p, r = (policy.tokenizer(text)["input_ids"] for text in (prompt, response))
        logits = policy.model(input_ids=torch.tensor([p + r])).logits[0, len(p) - 1 : -1]
        table = torch.distributions.Categorical(logits=logits / temperature)
        torch.testing.assert_close(log_probs[row, : len(r)], table.log_prob(torch.tensor(r)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[row, : len(r)], table.entropy(), atol=1e-5, rtol=1e-5)
        assert not log_probs[row, len(r) :].any()
        assert not entropy[row, len(r) :].any()


def test_rows_end_to_end_that_the_model_would_let_see_each_other():
    assert not FamilyPolicy("bert").packable
    with pytest.raises(
        InputError, match="packed`=True: BertLMHeadModel lets rows that lie end to end see each other"
    ):
        FamilyPolicy("bert", packed=True)


def test_a_model_without_positions_in_its_forward():
    policy = make_policy()
    forward = policy.model.model.forward

    def without(input_ids: Any, attention_mask: Any = None, use_cache: Any = None, **others: Any) -> Any:
        if others.pop("position_ids", None) is not None:
            raise TypeError("got an unexpected keyword argument 'position_ids'")
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    policy.model.model.forward = without
    policy.prepare_head({})
    assert not policy.packable


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_rows_end_to_end_are_the_same_as_padded_ones(family: str):
    policy = FamilyPolicy(family).double()
    rollouts = rollouts_of(policy, 0.7)
    gradients = []
    for policy.packed in (False, True):
        log_probs, entropy = policy(rollouts)
        (log_probs.square().sum()).backward()
        gradients.append(
            [log_probs.detach(), entropy] + [p.grad for p in policy.parameters() if p.grad is not None]
        )
        policy.zero_grad()
    for padded, packed in zip(*gradients, strict=True):
        # some families compute parts in float32 whatever the weights are
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_blocks_compute_the_same(gradient_checkpointing: bool):
    plain = make_policy()
    compiled = make_policy()
    compiled.compile_blocks = True
    compiled.gradient_checkpointing, compiled.model = gradient_checkpointing, None
    compiled.build()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.load_state_dict(plain.state_dict())
    for policy in (plain, compiled):
        policy(rollouts_of(policy, 0.7))[0].sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # something was compiled
    engine, texts = HFEngine(), []
    for policy in (plain, compiled):
        engine.update_weights(policy, 0)
        texts.append(engine.generate(make_batch(policy, list(PAIRS)), Sampling(max_new_tokens=6)).responses)
    assert texts[0] == texts[1]
    copied = compiled.as_reference()
    torch.testing.assert_close(copied(rollouts_of(copied, 0.7))[0], plain(rollouts_of(plain, 0.7))[0].detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_decoding_step(family: str):
    policy = FamilyPolicy(family)
    ids = torch.tensor([policy.tokenizer("9 - 4 = ; a b c")["input_ids"]])
    hidden = policy.hidden(input_ids=ids)[0]
    expected = policy.model(input_ids=ids).logits[0]
    torch.testing.assert_close(policy.logits(hidden), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.05  # a scale or a bound that is forgotten would show


class Forgetful(CausalLMPolicy):
    """Does not know what Granite does to its logits, which are as small as 0.01 in a fresh model."""

    tokenizer = word_tokenizer(WORDS.split())

    def __init__(self) -> None:
        super().__init__(config=family_config("granite", len(self.tokenizer)))

    def head(self) -> dict[str, Any]:
        return super().head() | {"scale": 1.0}


def test_a_model_that_treats_its_logits_in_a_way_of_its_own_is_asked_for_them():
    torch.manual_seed(3)
    policies = [FamilyPolicy("granite"), Forgetful()]
    policies[1].build()
    policies[1].load_state_dict(policies[0].state_dict())
    assert [policy.own_head is None for policy in policies] == [True, False]
    for policy in policies:
        policy(rollouts_of(policy, 0.7))[0].square().sum().backward()
    for ours, theirs in zip(policies[1].parameters(), policies[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert "forward" not in vars(policies[1].model.model)  # the transformer is as it was
    reference = policies[1].as_reference()
    assert reference.own_head.model is reference.model  # and not the trained one


def test_a_model_whose_logits_no_hidden_state_tells():
    policy = make_policy()
    policy.model.register_forward_hook(lambda _, inputs, out: setattr(out, "logits", torch.rand_like(out.logits)))
    with pytest.raises(InputError) as raised:
        policy.prepare_head({})
    assert "the logits of Qwen2ForCausalLM are not a function of its transformer's last hidden" in str(raised.value)
    assert str(raised.value).endswith("override CausalLMPolicy.logits for it.")


def test_the_check_of_the_head_leaves_the_attention_that_was_asked_for():
    """Flash kernels refuse float32, in which models are loaded, and CPUs, on which they may be."""
    policy = make_policy()
    policy.model.config._attn_implementation = "flash_attention_2"
    policy.prepare_head({})
    assert policy.model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize(("own", "expected"), [(None, [1]), (1, [1]), (7, [1, 7]), ([9, 5], [1, 5, 9])])
def test_end_of_sequence_ids_of_tokenizer_and_generation_config(own: Any, expected: list[int]):
    policy = make_policy()
    policy.model.generation_config.eos_token_id = own
    assert policy.eos_token_ids == expected


def test_a_model_from_a_config_has_the_tokenizers_ids():
    """Llama's own end of sequence is 2, which is an ordinary token in another vocabulary."""
    policy = CausalLMPolicy(
        config={"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    )
    policy.tokenizer = word_tokenizer(WORDS.split())
    policy.build()
    assert policy.eos_token_ids == [1]
    assert policy.model.config.pad_token_id == 0
    assert policy.model.get_output_embeddings().weight.shape == (38, 16)


def calls_of_the_last_block(policy: Any) -> list[bool]:
    """Filled at each forward of the last block's first part: whether gradients are on."""
    calls: list[bool] = []
    policy.model.model.layers[-1].input_layernorm.register_forward_pre_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    return calls


def test_gradient_checkpointing_recomputes_and_changes_no_number():
    plain, policy = make_policy(), make_policy()
    recomputing = CausalLMPolicy(config=policy.config, gradient_checkpointing=True)
    recomputing.tokenizer = policy.tokenizer
    recomputing.build()
    recomputing.load_state_dict(plain.state_dict())
    rollouts = rollouts_of(plain, 0.7)
    gradients, calls = [], []
    for each in (plain, recomputing):
        calls.append(calls_of_the_last_block(each))
        each(rollouts)[0].sum().backward()
        gradients.append([p.grad for p in each.parameters()])
    assert [len(found) for found in calls] == [1, 2]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)
    samples = []
    for each in (plain, recomputing):  # sampling keeps its cache
        engine = HFEngine()
        engine.update_weights(each, 0)
        samples.append(engine.generate(make_batch(plain, list(PAIRS)), Sampling(max_new_tokens=6)).response_ids)
    assert torch.equal(*samples)
    reference = copy.deepcopy(recomputing).requires_grad_(False)  # as SPPOModule makes one
    with torch.no_grad():
        for parameter in recomputing.parameters():
            parameter.zero_()
        torch.testing.assert_close(reference(rollouts)[0], plain(rollouts)[0])


def test_gradient_checkpointing_of_a_model_without_blocks():
    policy = make_policy()
    config = {
        "model_type": "openai-gpt",
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": len(policy.tokenizer),
    }
    again = CausalLMPolicy(config=config, gradient_checkpointing=True)
    again.tokenizer = policy.tokenizer
    with pytest.raises(InputError) as raised:
        again.build()
    assert str(raised.value) == (
        "`model.policy.gradient_checkpointing`=True: OpenAIGPTLMHeadModel has no blocks that transformers tells apart; "
        "set it to false."
    )
