"""What the cards say is what the run was and came to."""

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard
from lightning.pytorch import seed_everything
from tiny import FamilyPolicy, make_chain_sppo, make_critic, make_token_critic, make_trainer

from sppo_lightning import SFTModule, SPPOModule
from sppo_lightning.advantages import GAE
from sppo_lightning.callbacks import ExactMatch, RolloutGeneration
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.model_cards import critic_card, policy_card
from sppo_lightning.models import LoRA
from sppo_lightning.objectives import ClippedSquaredError


def row_of(card: ModelCard, name: str) -> list[str]:
    """The cells behind `name` in the card's only table row that begins with it."""
    (line,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", card.text, flags=re.MULTILINE)
    return line.split(" | ")


@pytest.fixture(scope="module")
def trained() -> tuple[SPPOModule, dict[str, float]]:
    """Two iterations of eight prompts, two samples each, validated at the end."""
    seed_everything(5, verbose=False)
    module = make_chain_sppo(1e-2, kl_coef=0.5)
    sets: dict[str, Any] = {name: ChainTask({"1-3": 1.0}, size=4, split="validation") for name in ("few", "same")}
    data = PromptDataModule(ChainTask({"1-3": 1.0}, size=16), sets, batch_size=8, suffix=" ;|\n")
    sampling = Sampling(max_new_tokens=8, samples_per_prompt=2)
    generation = RolloutGeneration(sampling, validation=Sampling(0.5, 8, 3, top_p=0.9), validation_greedy=True)
    trainer = make_trainer(generation, ExactMatch(extract="whole"))
    trainer.fit(module, data)
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_the_policys_card(trained: tuple[SPPOModule, dict[str, float]]):
    module, metrics = trained
    card = ModelCard(str(policy_card(module)))  # read again, as the hub does
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sppo-lightning", "reinforcement-learning"],
    }
    assert "\n8 updates on 32 responses, with sppo-lightning " in card.text  # in mini-batches of 4
    assert row_of(card, "metric") == ["few", "same", "all"]
    for kind in ("avg@3", "pass@3", "greedy"):
        assert row_of(card, kind) == [f"{metrics[f'val/{name}/{kind}']:.3f}" for name in ("few", "same", "all")]
    assert "critic_brier" not in card.text
    assert row_of(card, "policy_optimizer") == ["learning rate 0.01, weight decay 0.01"]
    assert row_of(card, "kl_coef") == ["0.5"]
    assert row_of(card, "sampling in validation") == [
        "temperature 0.5, max_new_tokens 8, samples_per_prompt 3, top_p 0.9"
    ]
    assert row_of(card, "suffix") == [r"' ;\|\n'"]
    assert row_of(card, "advantage")[0].startswith("SequenceAdvantage: SPPO: `A = R − sigmoid(v)`")


def test_the_critics_card(trained: tuple[SPPOModule, dict[str, float]]):
    module, metrics = trained
    card = ModelCard(str(critic_card(module)))
    assert card.data.pipeline_tag == "text-classification"
    assert "alone, before any response" in card.text
    assert 'function_to_apply="sigmoid"' in card.text
    for kind in ("critic_brier", "critic_pearson", "value_mean"):
        values = [metrics[f"val/{name}/{kind}"] for name in ("few", "same", "all")]
        assert row_of(card, kind) == [f"{value:.3f}" for value in values]
    assert "avg@3" not in card.text


def test_hub_ids_are_named_and_paths_of_this_machine_are_not():
    module = make_chain_sppo(1e-2, LoRA(rank=3))
    for owner in (module.policy, module.critic):
        owner.build()
    module.policy.pretrained = "Qwen/Qwen2.5-0.5B"
    module.record.datasets = ["openai/gsm8k"]
    card = ModelCard(str(policy_card(module, alone=True)))
    assert (card.data.base_model, card.data.datasets) == ("Qwen/Qwen2.5-0.5B", ["openai/gsm8k"])
    assert (card.data.library_name, "lora" in card.data.tags) == ("peft", True)
    assert 'AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")' in card.text
    assert row_of(card, "policy") == ["TinyPolicy, qwen2, LoRA of rank 3"]
    module.policy.pretrained = "/home/me/secret-project"
    assert "secret-project" not in str(policy_card(module))


def test_token_critics_values_that_are_no_logits_and_families_without_a_classifier():
    objective = ClippedSquaredError()
    module = make_chain_sppo(1e-2, critic=make_token_critic(), advantage=GAE(), critic_objective=objective)
    module.policy.build()
    card = critic_card(module).text
    assert "at each position" in card
    assert 'function_to_apply="none"' in card
    assert "register_classifier" not in card
    module = SPPOModule(FamilyPolicy("llama"), make_critic(config={"model_type": "granite"}))
    assert 'register_classifier("granite")' in critic_card(module).text


def test_supervised_learning_is_not_called_reinforcement():
    card = ModelCard(str(policy_card(SFTModule(FamilyPolicy("llama")))))
    assert card.data.tags == ["sppo-lightning", "sft"]
    assert "trained on demonstrations" in card.text
    assert "0 updates on 0 demonstrations" in card.text
