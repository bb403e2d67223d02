"""`python -m sppo_lightning export`: a checkpoint's policy and critic as Hugging Face folders."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sppo_lightning.base import PolicyModule
from sppo_lightning.cli_errors import sentence
from sppo_lightning.cli_parser import Parser
from sppo_lightning.cli_trainer import UNSAFE, check_exists, is_of_a_run, read_checkpoint
from sppo_lightning.errors import InputError
from sppo_lightning.exporting import Adapters, export
from sppo_lightning.record import RunRecord


def export_checkpoint(
    ckpt: str,
    to: str,
    adapters: Adapters = "both",
    config: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the policy and the critic of a checkpoint as Hugging Face folders, as HFExport does when a run ends.

    Args:
        ckpt: The checkpoint, a file that ModelCheckpoint wrote.
        to: Folder of the policy; the critic, where there is one, goes to its subfolder `critic`.
        adapters: What becomes of LoRA adapters: `merged` into a whole model, `alone` in a folder for peft, or
            `both`, those alone in the subfolder `adapter`.
        config: The run's config files, for a checkpoint that holds no config or the wrong one.
        overwrite: Write into a folder that is not empty.
        trust_remote_code: Run Python code that comes with the models, where the run did so.
    """
    path, folder = Path(ckpt).expanduser(), Path(to).expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"`--to`={to} is not an empty folder; give a new one, or set `--overwrite=true`.")
    checkpoint = _read(path)
    text = config or checkpoint.get("config")
    if text is None:
        raise InputError(f"`--ckpt`={path} holds no config, as none of a run from Python does; add `--config`.")
    module = module_of(text, "--config" if config else "--ckpt")
    for name, owner in _models(module).items():
        if owner.trust_remote_code and not trust_remote_code:
            raise InputError(
                f"`model.{name}.trust_remote_code`=True in the checkpoint's config lets code run that comes with "
                "the model; set `--trust_remote_code=true` if you trust it."
            )
    for name, owner in _models(module).items():
        owner.build()
        _load(owner, name, checkpoint["state_dict"], path)
    module.record = RunRecord(**checkpoint.get("record", {"updates": checkpoint["global_step"]}))
    try:
        export(module, folder, adapters)
    except OSError as error:
        raise InputError(f"`--to`={to} cannot be written ({error}); give a folder that can.") from error
    rank_zero_info(f"Saved the model of {path} to {folder}")


def module_of(text: str, setting: str) -> PolicyModule:
    """The module that the config `text` describes, without data, trainer and weights.

    Raises:
        InputError: It describes none that can be exported; `setting` is where it comes from.
    """
    config = yaml.safe_load(text)
    parser = Parser(exit_on_error=False)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    try:
        parsed = parser.parse_object({"model": config["model"] if isinstance(config, Mapping) else None})
    except (ArgumentError, KeyError) as error:
        reason = sentence(str(error), parser) if isinstance(error, ArgumentError) else "there is no `model` in it."
        raise InputError(f"The config of `{setting}` makes no model: {reason}") from error
    module = parser.instantiate_classes(parsed).model
    if not isinstance(module, PolicyModule):
        raise InputError(f"The model of `{setting}` is a {type(module).__name__}, which has no policy to export.")
    return module


def _read(path: Path) -> dict[str, Any]:
    check_exists(path, "--ckpt")
    if path.is_dir():  # whose index is a pickle, which is not for an export to run
        raise InputError(
            f"`--ckpt`={path} is a sharded checkpoint; make one file of it first: "
            f"python -m lightning.fabric.utilities.consolidate_checkpoint {path}."
        )
    try:
        checkpoint = read_checkpoint(path, "cpu")
    except pickle.UnpicklingError as error:
        raise InputError(
            f"`--ckpt`={path} {UNSAFE}; save one without the callback or component that they belong to."
        ) from error
    if not is_of_a_run(checkpoint):
        raise InputError(f"`--ckpt`={path} is not a checkpoint of a run; give a file that ModelCheckpoint wrote.")
    return checkpoint


def _models(module: PolicyModule) -> dict[str, Any]:
    """The models that are exported, by name; the reference is not among them."""
    found = {name: getattr(module, name, None) for name in ("policy", "critic")}
    return {name: owner for name, owner in found.items() if owner is not None}


def _load(owner: Any, name: str, state: Mapping[str, Tensor], path: Path) -> None:
    """Put the checkpoint's weights, in their own precision, in the place of those that `owner` was built with."""
    weights = {key.removeprefix(f"{name}."): w for key, w in state.items() if key.startswith(f"{name}.")}
    floating = [weight.dtype for weight in weights.values() if weight.is_floating_point()]
    try:
        owner.to(floating[0]).load_state_dict(weights)
    except (IndexError, RuntimeError) as error:
        raise InputError(
            f"`--ckpt`={path} does not hold the weights of the `{name}` that its config describes; the folder of "
            f"`model.{name}.pretrained` or `config` may have become another model since."
        ) from error
