from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_reward import RESPONSES, TEMPLATE, by_hand, rendered, save_reward_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sppo_lightning.batch import Prompt
from sppo_lightning.errors import InputError
from sppo_lightning.models.reward_model import RewardModel
from sppo_lightning.models.tiny import character_tokenizer

PROMPT = Prompt("2+3=", "5", "sums", 7)


def reward_model(folder: str, dtype: torch.dtype = torch.float32) -> RewardModel:
    return RewardModel(folder, "RewardModelVerifier.model", dtype)


def scores(model: RewardModel, micro_batch_tokens: int = 10**6, responses: list[str] = RESPONSES) -> list[float]:
    return model.scores([model.encode(PROMPT, text) for text in responses], micro_batch_tokens)


def test_scores_are_those_of_the_last_token_of_each_text_alone(tmp_path: Path):
    folder = save_reward_model(tmp_path)
    expected = [by_hand(folder, rendered("2+3=", text)) for text in RESPONSES]
    assert len({round(score, 3) for score in expected}) == len(RESPONSES)
    assert scores(reward_model(folder)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 200])
def test_scores_do_not_depend_on_the_batch(tmp_path: Path, micro_batch_tokens: int):
    model = reward_model(save_reward_model(tmp_path))
    assert scores(model, micro_batch_tokens) == pytest.approx(scores(model), abs=1e-5)
    assert scores(model, micro_batch_tokens, RESPONSES[::-1]) == pytest.approx(scores(model)[::-1], abs=1e-5)
    assert model.scores([], micro_batch_tokens) == []


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_text_that_ends_with_the_end_of_sequence_where_the_model_names_no_padding(
    tmp_path: Path, pad: str | None
):
    folder = save_reward_model(tmp_path, template=TEMPLATE + "<eos>", pad_token_id=None, pad_token=pad)
    model = reward_model(folder)
    texts = [rendered("2+3=", text) + "<eos>" for text in RESPONSES]
    assert model.encode(PROMPT, RESPONSES[0])[-1] == model.tokenizer.eos_token_id == 1
    assert scores(model) == pytest.approx([by_hand(folder, text) for text in texts], abs=1e-5)
    assert model.model.config.pad_token_id is None


def test_where_every_token_is_in_use_texts_are_read_one_by_one(tmp_path: Path):
    folder = save_reward_model(tmp_path, pad_token_id=None)
    model = reward_model(folder)
    everything = [list(range(model.model.config.vocab_size)), [5, 6, 7]]
    alone = [model.scores([ids], 10**6)[0] for ids in everything]
    assert model.scores(everything, 10**6) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_other_families_give_what_transformers_gives_for_one_text(tmp_path: Path, family: str):
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    sizes = {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.5}
    torch.manual_seed(0)
    made: Any = (
        BertForSequenceClassification(
            BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **sizes)
        )
        if family == "bert"
        else GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=128, **sizes))
    )
    made.save_pretrained(tmp_path)
    model = reward_model(str(tmp_path))
    assert model.max_tokens == {"bert": 512, "gpt2": 128}[family]
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = [
            alone(input_ids=torch.tensor([tokenizer("2+3=" + text)["input_ids"]])).logits.item()
            for text in RESPONSES
        ]
    assert scores(model) == pytest.approx(expected, abs=1e-5)  # without a chat template


def test_half_precision(tmp_path: Path):
    folder = save_reward_model(tmp_path)
    model = reward_model(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    expected = [by_hand(folder, rendered("2+3=", text), torch.bfloat16) for text in RESPONSES]
    assert scores(model) == pytest.approx(expected, rel=0.05, abs=0.05)
    with torch.autocast("cpu", torch.float16):  # as in a mixed-precision run
        assert scores(model) == scores(model)


def test_turns_and_what_is_left_out_of_a_response(tmp_path: Path):
    model = reward_model(save_reward_model(tmp_path))
    turns = ({"role": "system", "content": "Add."}, {"role": "user", "content": "2+3"})
    ids = model.encode(Prompt("never read", "5", "sums", 0, messages=turns), "is<eos>5<pa<eos>d>")
    assert ids == model.tokenizer("[system]Add.[user]2+3[assistant]is 5<pa d>")["input_ids"]


class Returns(torch.nn.Module):
    """What code of one's own may return in place of transformers' output: the lengths, `copies` times."""

    def __init__(self, model: Any, shape: tuple[int, ...], named: bool, copies: int = 1) -> None:
        super().__init__()
        self.config, self.device = model.config, torch.device("cpu")
        self.shape, self.named, self.copies = shape, named, copies

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = attention_mask.sum(1).float().repeat_interleave(self.copies).reshape(self.shape)
        return type("Output", (), {"logits": logits})() if self.named else (logits,)


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
@pytest.mark.parametrize("named", [True, False])
def test_logits_of_other_shapes(tmp_path: Path, shape: tuple[int, ...], named: bool):
    model = reward_model(save_reward_model(tmp_path))
    model.model = Returns(model.model, shape, named)
    assert model.scores([[5, 6, 7], [5], [5, 6]], 100) == [3.0, 1.0, 2.0]


def test_several_logits(tmp_path: Path):
    model = reward_model(save_reward_model(tmp_path))
    model.model = Returns(model.model, (-1, 2), True, copies=2)
    with pytest.raises(InputError, match="gives 2 numbers for a text"):
        model.scores([[5, 6], [5]], 100)


def refusal(folder: Any) -> str:
    with pytest.raises(InputError) as raised:
        reward_model(str(folder))
    return str(raised.value)


def test_models_that_cannot_be_used(tmp_path: Path):
    assert "`RewardModelVerifier.model`='./none' does not exist" in refusal("./none")
    folder = save_reward_model(tmp_path / "two", num_labels=2)
    assert refusal(folder).startswith(
        f"`RewardModelVerifier.model`={folder!r} gives 2 labels, not one score; give a"
    )
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded as a reward model" in refusal(tmp_path / "empty")
    headless = Path(save_reward_model(tmp_path / "headless"))
    Qwen2ForCausalLM(Qwen2Config.from_pretrained(headless)).save_pretrained(headless)
    assert "lacks the weights `score.weight` of Qwen2ForSequenceClassification, which would be random" in refusal(
        headless
    )
    mute = Path(save_reward_model(tmp_path / "mute"))
    for file in mute.glob("token*"):
        file.unlink()
    assert "holds no tokenizer" in refusal(mute)


def test_turns_that_the_template_refuses(tmp_path: Path):
    model = reward_model(save_reward_model(tmp_path, template="{{ raise_exception('no system turn') }}"))
    with pytest.raises(InputError, match=r"refuses the turns of row 7 of 'sums' \(no system turn\)"):
        model.encode(PROMPT, "5")
