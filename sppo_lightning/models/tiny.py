"""Small models from scratch, with a word-level tokenizer, for quick runs on a CPU."""

from __future__ import annotations

import string
from functools import cached_property

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer, Split, WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sppo_lightning.models.adapters import LoRA
from sppo_lightning.models.critic import PromptCritic
from sppo_lightning.models.policy import CausalLMPolicy


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `words`, split at white space, with `<pad>`, `<eos>` and `<unk>`."""
    return _tokenizer(words, WhitespaceSplit())


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per printable ASCII character, with `<pad>`, `<eos>` and `<unk>`."""
    return _tokenizer(list(string.printable), Split(Regex("[\\s\\S]"), "isolated"))


def _tokenizer(words: list[str], pre_tokenizer: PreTokenizer) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<eos>", "<unk>", *words]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


class TinyPolicy(CausalLMPolicy):
    """A Qwen2 with random weights and a word-level tokenizer: a policy that trains on one CPU core.

    Args:
        words: The vocabulary, in one string, separated by white space.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; must divide `hidden_size`.
        intermediate_size: Width of the feed-forward layers.
        max_tokens: Longest sequence, prompt and response together, in tokens.
        lora: Train adapters in place of all weights.
    """

    def __init__(
        self,
        words: str,
        hidden_size: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        intermediate_size: int = 256,
        max_tokens: int = 256,
        lora: LoRA | None = None,
    ) -> None:
        self.words = words.split()
        super().__init__(
            config={
                "model_type": "qwen2",
                "vocab_size": len(self.tokenizer),
                "hidden_size": hidden_size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": num_heads,
                "num_key_value_heads": num_heads,
                "intermediate_size": intermediate_size,
                "max_position_embeddings": max_tokens,
                "initializer_range": 0.08,  # at this width transformers' 0.02 learns several times slower
                "tie_word_embeddings": True,
                "pad_token_id": self.tokenizer.pad_token_id,
                "bos_token_id": None,
                "eos_token_id": self.tokenizer.eos_token_id,
            },
            lora=lora,
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The word-level tokenizer over `words`."""
        return word_tokenizer(self.words)


class CharacterCritic(PromptCritic):
    """A small critic from scratch that reads characters: another architecture and tokenizer than the policy's.

    Args:
        model_type: Family of the backbone, as transformers calls it; one whose config takes the usual names.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; must divide `hidden_size`.
        max_tokens: Longest prompt, in characters; longer ones lose their beginning.
        lora: Train adapters and the value head in place of all weights.
    """

    def __init__(
        self,
        model_type: str = "gpt2",
        hidden_size: int = 32,
        num_layers: int = 2,
        num_heads: int = 4,
        max_tokens: int = 256,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__(
            config={
                "model_type": model_type,
                "hidden_size": hidden_size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": num_heads,
                "max_position_embeddings": max_tokens,
                "bos_token_id": None,  # the family's own is an id of the family's own vocabulary
                "eos_token_id": self.tokenizer.eos_token_id,
            },
            max_prompt_tokens=max_tokens,
            lora=lora,
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """One token per printable ASCII character."""
        return character_tokenizer()
