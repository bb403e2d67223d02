"""A reward model of two layers, with a tokenizer of characters, and its scores computed apart."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForSequenceClassification

from sppo_lightning.models.tiny import character_tokenizer

TEMPLATE = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
RESPONSES = ["5", "It is 5, because 2 and 3 are 5.", "", "6?", "I would say that it is 7 or so."]


def rendered(prompt: str, response: str) -> str:
    return f"[user]{prompt}[assistant]{response}"


def save_reward_model(
    folder: Path, template: str | None = TEMPLATE, pad_token: str | None = "<pad>", **config: Any
) -> str:
    """With random weights, large enough that scores differ."""
    characters = character_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", unk_token="<unk>")
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,
        "num_labels": 1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(4)
    Qwen2ForSequenceClassification(Qwen2Config(**(sizes | config))).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def by_hand(folder: str, text: str, dtype: torch.dtype = torch.float32) -> float:
    """The head on the hidden state of the last character, without padding, masks or transformers' own choice."""
    model = Qwen2ForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    hidden = model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
    return (hidden[0, -1] @ model.score.weight[0]).item()
