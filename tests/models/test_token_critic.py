"""A critic with a value before every response token."""

import pytest
import torch
from tiny import make_batch, make_critic, make_policy, make_token_critic

from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.models import CharacterCritic

PROMPTS = ["1 + 2 =", "7", "9 - 4 = ; a"]
RESPONSES = ["3 <eos>", "a b c d e", "5 <eos>"]


def rollouts(policy):
    ids = [policy.tokenizer(text)["input_ids"] for text in RESPONSES]
    zeros = [[0.0] * len(row) for row in ids]
    batch = make_batch(policy, PROMPTS)
    reasons = ["stop", "length", "stop"]
    return pack_rollouts(batch, [0, 1, 2], ids, zeros, reasons, policy=policy, temperature=1.0, versions=[0] * 3)


def test_each_value_is_from_before_its_token():
    policy, critic = make_policy(), make_token_critic()
    critic.check_policy(policy)
    batch = rollouts(policy)
    values = critic.outputs(batch)
    assert values.shape == batch.response_mask.shape
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        prompt_ids, ids = (policy.tokenizer(text)["input_ids"] for text in (prompt, response))
        for t in range(len(ids)):
            # the classifier's own forward reads what stands before token t, and nothing else
            own = critic.model(torch.tensor([prompt_ids + ids[:t]])).logits[0, 0]
            torch.testing.assert_close(values[row, t], own, rtol=0, atol=1e-5)


def test_the_first_value_is_the_prompts():
    policy, critic = make_policy(), make_token_critic()
    batch = rollouts(policy)
    token_ids = [policy.tokenizer(text)["input_ids"] for text in PROMPTS]
    of_prompts = critic.prompt_outputs(batch.prompts, token_ids)
    torch.testing.assert_close(of_prompts, critic.outputs(batch)[:, 0], rtol=0, atol=1e-5)
    assert critic.prompt_lengths(batch.prompts, token_ids) == [4, 1, 6]
    assert critic.lengths(batch) == [6, 6, 8]


def test_a_policy_with_other_tokens_is_refused():
    critic = make_token_critic()
    critic.tokenizer.add_tokens(["new"])
    with pytest.raises(InputError) as raised:
        critic.check_policy(make_policy())
    assert "reads other token ids than the policy" in str(raised.value)
    assert "PromptCritic" in str(raised.value)


def test_a_frozen_backbone_reads_each_prompt_once():
    policy, critic, plain = make_policy(), make_critic(freeze_backbone=True), make_critic()
    prompts = make_batch(policy, PROMPTS).prompts
    torch.testing.assert_close(critic(prompts), plain(prompts), rtol=0, atol=1e-6)
    reads = []
    critic.model.base_model.register_forward_hook(lambda *_: reads.append(1))
    loss = critic([*prompts, prompts[0]]).sum()
    loss.backward()
    assert reads == []
    trained = {name for name, p in critic.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"model.score.weight"}
    critic(make_batch(policy, ["8 8"]).prompts)
    assert reads == [1]


def test_a_critic_that_reads_characters():
    critic = CharacterCritic(hidden_size=16, num_layers=1, num_heads=2, max_tokens=8)
    critic.build()
    [ids] = critic.encode(make_batch(make_policy(), ["a + b"]).prompts)
    assert critic.tokenizer.convert_ids_to_tokens(ids) == ["a", " ", "+", " ", "b"]
    [ids] = critic.encode(make_batch(make_policy(), ["1 + 2 + 3 + 4"]).prompts)
    assert "".join(critic.tokenizer.convert_ids_to_tokens(ids)) == " + 3 + 4"
    assert type(critic.model).__name__ == "GPT2ForSequenceClassification"
    assert float(critic(make_batch(make_policy(), ["1"]).prompts).sigmoid()) == 0.5
