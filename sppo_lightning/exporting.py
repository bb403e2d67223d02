"""What leaves a run: policy and critic as Hugging Face folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig

from sppo_lightning.model_cards import critic_card, policy_card
from sppo_lightning.models.adapters import save_adapter, save_merged

Adapters = Literal["both", "merged", "alone"]  # what becomes of adapters: a whole model, a folder for peft, or both


def export(module: Any, path: Path, adapters: Adapters = "both", *, writes: bool = True) -> None:
    """Write the policy of a `PolicyModule` to `path`, and the critic, if there is one, to its subfolder `critic`.

    Each folder holds safetensors, tokenizer with chat template, and a model card, the policy's the generation
    config too. Models without adapters are written whole, whatever `adapters` says. A collective where they are
    sharded, of which the ranks with `writes` write.
    """
    models = [(module.policy, path, policy_card), (getattr(module, "critic", None), path / "critic", critic_card)]
    for owner, folder, card in models:
        if owner is None:
            continue
        _save(owner, folder, adapters, writes)
        if writes:
            card(module, owner.lora is not None and adapters == "alone").save(folder / "README.md")
        if writes and owner.lora is not None and adapters == "both":
            card(module, True).save(folder / "adapter" / "README.md")
    if writes:
        generation_config(module).save_pretrained(path)


def generation_config(module: Any) -> GenerationConfig:
    """How the policy is sampled where nobody says otherwise: as in the run's validation, whose metrics it has."""
    policy, sampling = module.policy, module.record.sampling
    if not sampling:
        return copy.deepcopy(policy.model.generation_config)
    names = ("temperature", "top_p", "top_k", "min_p") if sampling["temperature"] else ()
    return GenerationConfig(
        bos_token_id=policy.tokenizer.bos_token_id,
        eos_token_id=ids if len(ids := policy.eos_token_ids) > 1 else ids[0],
        pad_token_id=policy.tokenizer.pad_token_id,
        do_sample=bool(names),
        **{name: sampling[name] for name in names},
    )


def _save(owner: Any, path: Path, adapters: Adapters, writes: bool) -> None:
    if writes:
        path.mkdir(parents=True, exist_ok=True)  # transformers passes over a path that is a file
    if owner.lora is None or adapters != "alone":
        save_merged(owner.model, path, writes)
    if owner.lora is not None and adapters != "merged":
        folder = path if adapters == "alone" else path / "adapter"
        save_adapter(owner.model, folder, owner.head_weights(), writes)
    if writes:
        owner.tokenizer.save_pretrained(path)
