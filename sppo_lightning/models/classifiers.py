"""Sequence classifiers for every family of causal language models, also those that transformers gives none."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)


def register_classifier(model_type: str) -> None:
    """Let AutoModelForSequenceClassification load the causal family `model_type`, where transformers cannot.

    A process needs this before it opens the folder of such a critic itself, in a `pipeline` for instance;
    `PromptCritic` sees to it on its own.

    Raises:
        KeyError: transformers knows no `model_type`.
    """
    _register(CONFIG_MAPPING[model_type])


def classifier_config(config: PreTrainedConfig, label: str, pad_token_id: int) -> PreTrainedConfig:
    """The config of a classifier with the one label `label`, whose class is registered where there was none.

    Of a model that reads more than text it is the config of the text part, if the causal model is that part.
    """
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    text = config.get_text_config()
    if causal is not None and causal.config_class is type(text):
        config = text
    _register(type(config))
    config.id2label, config.label2id = {0: label}, {label: 0}
    config.problem_type = "multi_label_classification"  # for transformers: a sigmoid for each of the labels
    for part in (config, config.get_text_config()):
        part.pad_token_id = pad_token_id
    return config


def _register(config_class: type[PreTrainedConfig]) -> None:
    """Make and register the class, unless there is one or the family has no causal model to make it of."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    if causal is not None and config_class not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        AutoModelForSequenceClassification.register(config_class, _classifier(config_class, causal), exist_ok=True)


def _classifier(config_class: type[PreTrainedConfig], causal: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A linear head on the last token's hidden state of the base model that `causal` has."""
    family = next(each for each in causal.__mro__ if PreTrainedModel in each.__bases__)
    name = family.__name__.removesuffix("PreTrainedModel") + "ForSequenceClassification"
    members = {
        "base_model_prefix": causal.base_model_prefix,  # so that the weights of a causal model find their place
        "config_class": config_class,
        "__module__": family.__module__,  # transformers reads older checkpoints into classes of its own only
        "__doc__": f"A {family.__name__.removesuffix('PreTrainedModel')} with a linear classification head.",
    }
    return type(name, (_LastTokenClassifier, family), members)


class _LastTokenClassifier(GenericForSequenceClassification):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.base_model.register_forward_hook(_complete)  # type: ignore[attr-defined]


def _complete(module: nn.Module, args: Any, output: Any) -> None:
    """Give the output of a state-space model the entries that transformers' head passes on from attention."""
    for name in ("past_key_values", "hidden_states", "attentions"):
        if not hasattr(output, name):
            setattr(output, name, None)
