"""What the rollout engines are compared on: models, prompts and lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from race_runs import warm_model, warm_start

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.data import ChainTask
from sppo_lightning.engines import Sampling
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.tiny import word_tokenizer

_WORDS = [f"w{i}" for i in range(1021)]  # 1,024 ids with the special ones


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    policy: Callable[[], CausalLMPolicy]
    prompts: Callable[[CausalLMPolicy], PromptBatch]
    sampling: Sampling


class RandomPolicy(CausalLMPolicy):
    """A model with random weights; each token ends the response with a given chance.

    Args:
        family: Family of the model, as transformers calls it.
        width: Of the residual stream.
        layers: Transformer blocks.
        key_value_heads: Of 4 heads, how many have keys and values of their own.
        stop_chance: Share of the vocabulary that ends a response; random weights draw about evenly from it.
    """

    def __init__(
        self, family: str, width: int, layers: int, key_value_heads: int = 4, stop_chance: float = 0.0
    ) -> None:
        self.words = word_tokenizer(_WORDS)
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 3 * width}
        heads = {"num_attention_heads": 4, "num_key_value_heads": key_value_heads, "head_dim": width // 4}
        own = {"gpt2": {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 4096}}
        config = own.get(family, {**sizes, **heads, "max_position_embeddings": 4096})
        super().__init__(config={"model_type": family, **config})
        torch.manual_seed(0)
        self.build()
        ends = round(stop_chance * len(self.words))
        self.model.generation_config.eos_token_id = list(range(3, 3 + ends)) or [1]

    @property
    def tokenizer(self) -> Any:
        """A word for each of 1,021 ids."""
        return self.words


def trained(folder: Path) -> CausalLMPolicy:
    """The quickstart's warm start, which is trained first where it is not there."""
    warm_start(folder, seed=1)
    policy = CausalLMPolicy(str(warm_model(folder, seed=1)))
    policy.build()
    return policy


def chains(count: int) -> Callable[[CausalLMPolicy], PromptBatch]:
    """Chains of 2 to 10 operations."""

    def make(policy: CausalLMPolicy) -> PromptBatch:
        rows = ChainTask({"2-10": 1.0}, size=count, seed=3).rows()
        texts = [str(row["prompt"]) for row in rows]
        prompts = [Prompt(text, "", "chains", i) for i, text in enumerate(texts)]
        return PromptBatch(prompts, policy.tokenizer(texts)["input_ids"], [0] * count)

    return make


def random_prompts(count: int, least: int, most: int) -> Callable[[CausalLMPolicy], PromptBatch]:
    """Prompts of `least` to `most` tokens."""

    def make(_: CausalLMPolicy) -> PromptBatch:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(least, most + 1, (count,), generator=generator).tolist()
        rows = [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in lengths]
        return PromptBatch([Prompt("", "", "random", i) for i in range(count)], rows, [0] * count)

    return make


def cases(folder: Path) -> list[Case]:
    """All rows: the quickstart's lengths, then one thing changed at a time."""

    def random(stop: float, width: int = 128, layers: int = 3, family: str = "qwen2", shared: int = 4) -> Any:
        return lambda: RandomPolicy(family, width, layers, shared, stop)

    short, middle = random_prompts(64, 8, 32), random_prompts(64, 32, 128)
    quick = Sampling(max_new_tokens=64)
    return [
        Case("quickstart, 256 prompts", lambda: trained(folder), chains(256), quick),
        Case("quickstart, 32 prompts × 8", lambda: trained(folder), chains(32), Sampling(1.0, 64, 8)),
        Case("quickstart, 8 prompts", lambda: trained(folder), chains(8), quick),
        Case("quickstart, greedy", lambda: trained(folder), chains(256), Sampling(0.0, 64)),
        Case("0.9M, about 40 of 64 tokens", random(0.025), short, quick),
        Case("0.9M, all of 128 tokens", random(0.0), short, Sampling(max_new_tokens=128)),
        Case("0.9M, about 100 of 512 tokens", random(0.01), middle, Sampling(max_new_tokens=512)),
        Case("0.9M, one prompt", random(0.0), random_prompts(1, 32, 32), Sampling(max_new_tokens=128)),
        Case("25M, about 60 of 128 tokens", random(0.015, 512, 7), short, Sampling(max_new_tokens=128)),
        Case("llama, shared keys, 40 of 64", random(0.025, family="llama", shared=1), short, quick),
        Case("gpt2, 40 of 64", random(0.025, family="gpt2"), short, quick),
        Case("gemma2, 40 of 64", random(0.025, family="gemma2"), short, quick),
        Case("mistral, 40 of 64", random(0.025, family="mistral"), short, quick),
    ]
