"""What policy and critic share: a transformers model with its tokenizer, and how both come to be loaded."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from sppo_lightning.errors import InputError
from sppo_lightning.memory import is_out_of_memory
from sppo_lightning.models.adapters import LoRA, add_adapters
from sppo_lightning.models.loading import (
    check_exists,
    compile_layers,
    first_sentence,
    load_model,
    load_tokenizer,
    recompute_layers,
)
from sppo_lightning.models.quantized import in_4_bits, settle


class PretrainedModule(nn.Module):
    """A transformers model and its tokenizer; the weights are loaded by `build`, not before.

    Args:
        pretrained: Folder or hub id of the model, such as `Qwen/Qwen2.5-1.5B`.
        tokenizer: Folder or hub id of the tokenizer; the model's own when left out.
        config: Build a model with random weights from these transformers config values (`model_type` among
            them) instead of loading `pretrained`; `tokenizer` must then be given.
        attn_implementation: Attention of transformers: `sdpa`, `eager`, `flash_attention_2`; its default when
            left out.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        compile: Compile each block with `torch.compile`, for the update: worth the first minutes for a large model
            on a GPU.
        trust_remote_code: Run Python code that comes with the model.
        lora: Train low-rank adapters, and a critic's value head, in place of all weights; needs the extra `lora`.
    """

    setting: ClassVar[str]  # where the configuration has this module, for errors
    auto_class: ClassVar[Any]  # transformers' AutoModel that loads it
    group: DeviceMesh | None = None  # the ranks that compute its layers together, each a part

    def __init__(
        self,
        pretrained: str | None = None,
        tokenizer: str | None = None,
        config: dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.tokenizer_name = tokenizer or pretrained
        self.config = config
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_blocks = compile
        self.trust_remote_code = trust_remote_code
        self.lora = lora
        self.model: Any = None  # the transformers model, once `build` has run

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The module's own tokenizer, loaded on first use."""
        if self.tokenizer_name is None:
            raise InputError(f"`{self.setting}` needs `pretrained`, or `config` together with `tokenizer`.")
        if self.pretrained is not None:
            check_exists(self.pretrained, f"{self.setting}.pretrained")
        return load_tokenizer(self.tokenizer_name, f"{self.setting}.tokenizer", self.trust_remote_code)

    def build(self) -> None:
        """Load the weights; a second call does nothing.

        Raises:
            InputError: the model cannot be loaded, lacks weights, or is of no use for this module.
        """
        if self.model is not None:
            return
        self.model, info = load_model(
            self.auto_class,
            self.pretrained,
            self.config and {**self._special_ids(), **self.config},
            setting=self.setting,
            trust_remote_code=self.trust_remote_code,
            attn_implementation=self.attn_implementation,
            adapt=self.adapt_config,
            quantization=in_4_bits(self.setting) if self.lora is not None and self.lora.load_in_4bit else None,
        )
        if self.lora is not None and self.lora.load_in_4bit:
            settle(self, self.model)
        self.check_weights(info)
        self._check_vocabulary()
        if self.gradient_checkpointing:
            recompute_layers(self.model, self.setting)
        try:
            self.prepare_head(info)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError) or is_out_of_memory(error):
                raise
            raise InputError(
                f"`{self.setting}.{'pretrained' if self.config is None else 'config'}` makes a "
                f"{type(self.model).__name__} that cannot read a few tokens ({first_sentence(error)}); correct its "
                "sizes."
            ) from error
        if self.lora is not None:
            add_adapters(self.model, self.lora, self.setting, self.head_weights())
        if self.compile_blocks:
            compile_layers(self.model, self.setting)

    def adapt_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config to load the model with, given its own."""
        return config

    def prepare_head(self, info: dict[str, Any]) -> None:
        """Check or set what turns hidden states into this module's output; `info` is as in `load_model`."""

    def head_weights(self) -> set[str]:
        """Names of the weights that a checkpoint may lack, because `prepare_head` sets them."""
        return set()

    def check_weights(self, info: dict[str, Any]) -> None:
        """Refuse a checkpoint that would leave random weights among its own; `info` is as in `load_model`."""
        if self.config is not None:
            return
        for name, found, needed in sorted(info["mismatched_keys"]):
            raise InputError(
                f"`{self.setting}.pretrained`={self.pretrained!r} holds `{name}` of shape {list(found)}, where "
                f"its config makes {list(needed)} of it; give a folder whose config.json and weights agree."
            )
        missing = sorted(set(info["missing_keys"]) - self.head_weights())
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"`{self.setting}.pretrained`={self.pretrained!r} lacks the weights `{missing[0]}`{more} of "
                f"{type(self.model).__name__}, which would start at random; give the folder or hub id of a whole "
                "model."
            )

    def _check_vocabulary(self) -> None:
        """Refuse a tokenizer with ids that the model has no embedding for."""
        rows, ids = len(self.model.get_input_embeddings().weight), len(self.tokenizer)
        if ids > rows:
            raise InputError(
                f"`{self.setting}.tokenizer`={self.tokenizer_name!r} has {ids} tokens, and the model embeds "
                f"{rows}; give the tokenizer that belongs to it."
            )

    def _special_ids(self) -> dict[str, Any]:
        """Of the tokenizer: a family's defaults are of another one, and responses would stop where they stand."""
        ids = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {"vocab_size": len(self.tokenizer)} | {name: id for name, id in ids.items() if id is not None}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device
