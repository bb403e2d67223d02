"""Whether a checkpoint is one of this model, told before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sppo_lightning.errors import InputError


def check_same_weights(module: nn.Module, saved: Mapping[str, Tensor], path: str) -> None:
    """Raise `InputError` for the first weight that only one of them has, or that has another shape in the other.

    Args:
        module: Its first level (`policy`, `critic` …) is how the configuration calls the models.
        saved: The checkpoint's weights by name.
        path: Where the checkpoint is, for the sentence.
    """
    own = module.state_dict()
    for name in [*own, *(name for name in saved if name not in own)]:
        shapes = [list(weights[name].shape) if name in weights else None for weights in (saved, own)]
        if shapes[0] == shapes[1]:
            continue
        part = name.partition(".")[0]
        owner = f"`model.{part}`" if part in ("policy", "critic") else f"this run's {part}"
        if None in shapes:
            what = f"it lacks `{name}`, which {owner} has" if name in own else f"it holds `{name}`, and {owner} not"
        else:
            what = f"its `{name}` has the shape {shapes[0]}, and that of {owner} {shapes[1]}"
        raise InputError(
            f"`--ckpt_path`={path} is of another model: {what}; give a checkpoint of this config, or that "
            "checkpoint's config."
        )
