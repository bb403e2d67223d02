"""Model cards: what a folder holds, how it was trained, and what the training came to."""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sppo_lightning.data.sources import is_hub_id
from sppo_lightning.evaluation import metric_rows
from sppo_lightning.objectives import BinaryCrossEntropy

_CARD = """---
{{ card_data }}
---

# {{ title }}

{{ about }}

```python
{{ usage }}
```

## Training

{{ record.updates }} updates on {{ record.samples }} {{ unit }}, with sppo-lightning {{ version }}.

| setting | value |
| --- | --- |
{%- for name, value in settings.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{% if metrics %}
## {{ heading }}
{% for row in metrics %}
| {{ row | join(" | ") }} |
{%- if loop.first %}
|{{ " --- |" * (row | length) }}
{%- endif %}
{%- endfor %}
{% endif %}"""

_POLICY = {
    True: "A causal language model, trained by reinforcement on rewards that can be verified.",
    False: "A causal language model, trained on demonstrations.",
}
_USE_POLICY = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
_USE_ADAPTER = """from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}"{labels})
model = PeftModel.from_pretrained(base, "FOLDER")"""
_CRITIC = {
    "prompt": """How solvable is this prompt for the policy that was trained beside this critic? The score of the
label `solvable` is the chance, from 0 to 1, that the policy's response earns the reward. It is predicted from the
prompt alone, before any response, and it is about that policy, that sampling and that reward. The text is what the
critic read: the prompt, or, where this tokenizer has a chat template, what that makes of the turns.""",
    "token": """The critic of token-level PPO: at each position the value of what has been written so far, of which
a classifier shows the last, in the logits. Its text is the policy's: prompt and response, template applied.""",
}
_USE_CRITIC = """from transformers import pipeline

rate = pipeline("text-classification", model="FOLDER", function_to_apply="{function}")
rate("…")  # [{{'label': 'solvable', 'score': …}}]"""
_REGISTER = """from sppo_lightning.models.classifiers import register_classifier

register_classifier("{family}")  # of which transformers has no classifier
"""


def policy_card(module: Any, alone: bool = False) -> ModelCard:
    """The card of the policy's folder; `alone` where that holds adapters without their base model."""
    critics = _critic_metrics(module)
    return _card(
        module,
        module.policy,
        alone,
        task="text-generation",
        about=_POLICY[_reinforces(module)],
        usage=_USE_POLICY,
        heading="Last validation",
        metrics={name: value for name, value in module.record.validation.items() if name not in critics},
    )


def critic_card(module: Any, alone: bool = False) -> ModelCard:
    """The card of the critic's folder: what its score means, and how well it foresees."""
    model, is_logit = module.critic.model, isinstance(module.critic_objective, BinaryCrossEntropy)
    known = hasattr(inspect.getmodule(type(model)), type(model).__name__)
    register = "" if known else f"{_REGISTER.format(family=model.config.model_type)}\n"
    return _card(
        module,
        module.critic,
        alone,
        task="text-classification",
        about=_CRITIC[module.critic.reads],
        usage=register + _USE_CRITIC.format(function="sigmoid" if is_logit else "none"),
        heading="V against the pass rates of the last validation",
        metrics=_critic_metrics(module),
    )


def _card(
    module: Any, owner: Any, alone: bool, *, task: str, usage: str, metrics: dict[str, float], **texts: str
) -> ModelCard:
    base, lora = owner.pretrained or "", [] if owner.lora is None else ["lora"]
    data = ModelCardData(
        base_model=base if base and is_hub_id(base) else None,
        datasets=module.record.datasets or None,
        library_name="peft" if alone else "transformers",
        pipeline_tag=task,
        tags=["sppo-lightning", "reinforcement-learning" if _reinforces(module) else "sft", *lora],
    )
    if alone:
        labels = "" if task == "text-generation" else ", num_labels=1"
        usage = _USE_ADAPTER.format(auto=owner.auto_class.__name__, base=base or "BASE", labels=labels)
    release = "from source"
    with suppress(PackageNotFoundError):
        release = version("sppo-lightning")
    return ModelCard.from_template(
        data,
        template_str=_CARD,
        title=f"{'Critic' if task == 'text-classification' else 'Policy'} of {type(module).__name__}",
        usage=usage,
        record=module.record,
        unit="responses" if _reinforces(module) else "demonstrations",
        version=release,
        settings=_settings(module),
        metrics=metric_rows(metrics) if metrics else [],
        **texts,
    )


def _reinforces(module: Any) -> bool:
    return hasattr(module, "advantage")


def _critic_metrics(module: Any) -> dict[str, float]:
    """Of the last validation, those that are about the critic."""
    found = module.record.validation.items()
    return {name: value for name, value in found if re.search(r"/(critic_\w+|value_mean)$", name)}


def _settings(module: Any) -> dict[str, str]:
    """What decides how the run learns, for a table."""
    found: dict[str, Any] = {"module": type(module).__name__}
    for name in ("advantage", "objective", "critic_objective"):
        if part := getattr(module, name, None):
            first_line = (inspect.getdoc(type(part)) or "a class of its own").splitlines()[0]
            found[name] = f"{type(part).__name__}: {first_line}"
    for name in ("policy_optimizer", "critic_optimizer", "optimizer"):
        if rates := getattr(module, name, None):
            found[name] = f"learning rate {rates.lr:g}, weight decay {rates.weight_decay:g}"
    for name in ("policy", "critic"):
        owner = getattr(module, name, None)
        if owner is not None:
            kind = f"{type(owner).__name__}, {owner.model.config.model_type}"
            found[name] = kind if owner.lora is None else f"{kind}, LoRA of rank {owner.lora.rank}"
    for name in ("lr_schedule", "mini_batch_size", "kl_coef"):
        if getattr(module, name, None) is not None:
            found[name] = getattr(module, name)
    if sampled := module.record.sampling:
        found["sampling in validation"] = ", ".join(f"{name} {value}" for name, value in sampled.items() if value)
    found |= {name: repr(text) for name, text in module.record.prompts.items()}
    return {name: str(value).replace("|", "\\|") for name, value in found.items()}
