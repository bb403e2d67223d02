"""Settings that policy and critic share stand in one place, and the command line still has them all."""

import copy

import pytest
from jsonargparse import ArgumentParser
from tiny import make_critic, make_policy

from sppo_lightning.models import CausalLMPolicy, PromptCritic
from sppo_lightning.models.pretrained import PretrainedModule

SHARED = {
    "pretrained": (None, "Folder or hub id of the model"),
    "tokenizer": (None, "Folder or hub id of the tokenizer"),
    "config": (None, "Build a model with random weights"),
    "attn_implementation": (None, "Attention of transformers"),
    "gradient_checkpointing": (False, "Recompute activations in the backward pass"),
    "compile": (False, "Compile each block"),
    "trust_remote_code": (False, "Run Python code that comes with the model"),
    "lora": (None, "Train low-rank adapters"),
}
POLICY = {"packed": (None, "Lay the rows of a micro-batch end to end")}
OWN = {
    "max_prompt_tokens": (2048, "Longer prompts lose their beginning"),
    "freeze_backbone": (False, "Train the value head alone"),
}


@pytest.mark.parametrize(
    ("component", "settings"), [(CausalLMPolicy, SHARED | POLICY), (PromptCritic, SHARED | OWN)]
)
def test_the_command_line_has_every_setting_with_its_help(component: type, settings: dict[str, tuple[object, str]]):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(component)
    found = {action.dest: action for action in parser._actions if not action.dest.endswith("help")}
    assert {name: action.default for name, action in found.items()} == {
        n: value for n, (value, _) in settings.items()
    }
    for name, (_, text) in settings.items():
        assert str(found[name].help).startswith(text)


@pytest.mark.parametrize("make", [make_policy, make_critic])
def test_a_second_build_does_nothing(make: type):
    module: PretrainedModule = make()
    model, weights = module.model, copy.deepcopy(module.state_dict())
    module.build()
    assert module.model is model
    assert all(weights[name].equal(weight) for name, weight in module.state_dict().items())
