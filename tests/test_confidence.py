"""The tokens that say an answer, found by tokenizers of every kind, and the policy's confidence in them."""

import math
import random
from typing import Any

import pytest
import torch
from test_evaluation import scored
from tiny import CHAIN_WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sppo_lightning.calibration import confidence_metrics
from sppo_lightning.confidence import PolicyConfidence, answer_tokens
from sppo_lightning.evaluation import Evaluation
from sppo_lightning.models import TinyPolicy

TEXT = [r"I add 40 and 2 \boxed{42}.", "The final answer is √2, I hope. Answer: 🙂\n#### 42 🙂"] * 3
NAN = math.nan
POLICY = TinyPolicy(CHAIN_WORDS)


def trained(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def byte_level(size: int) -> PreTrainedTokenizerFast:
    """As Qwen's and Llama 3's; a size of 258 has no merges, so that every byte is a token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    parts = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), trainer, parts, decoders.ByteLevel())


def pieces() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space belongs to the word behind it, and is lost where the text begins with it."""
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<eos>", "<pad>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def place(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[slice | None, list[str]]:
    """Where the answer is, and the texts of all tokens."""
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    response = tokenizer.decode(ids, skip_special_tokens=True)
    return answer_tokens(tokenizer, ids, response), [tokenizer.decode([i]) for i in ids]


def test_every_word_a_token() -> None:
    found, texts = place(POLICY.tokenizer, r"4 2 ; a 4 +2 = 6 ; \boxed{ 4 2 } 4 2")
    assert found == slice(10, 12)
    assert texts[9:13] == [r"\boxed{", "4", "2", "}"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"as 40 + 2 is 42, \boxed{42}.", "42"),
        (r"√2 \boxed{√2} √2", "√2"),  # of three bytes, none of which is a character
        (r"🙂🙂 \boxed{🙂} 🙂", "🙂"),
        ("é\n#### 🙂🙂é\n🙂", "🙂🙂é"),
    ],
)
def test_every_byte_a_token(text: str, answer: str) -> None:
    found, _ = place(byte_level(258), text)
    before = text[: text.index(r"\boxed{") + 7] if "boxed" in text else "é\n#### "
    start = len(before.encode())
    assert found == slice(start, start + len(answer.encode()))


def test_merged_bytes() -> None:
    tokenizer = byte_level(330)
    found, texts = place(tokenizer, TEXT[0])
    assert found is not None
    assert len(texts) < len(TEXT[0])
    assert "42" in "".join(texts[found])
    assert "42" not in "".join(texts[found][1:])
    assert "42" not in "".join(texts[found][:-1])


@pytest.mark.parametrize("size", [258, 300, 330])
def test_any_text_of_merged_bytes(size: int) -> None:
    """The tokens say the answer, and fewer of them do not."""
    tokenizer, chance = byte_level(size), random.Random(size)
    for _ in range(100):
        before, answer, behind = ("".join(chance.choices("4 2aI√é🙂漢.", k=chance.randint(1, 8))) for _ in range(3))
        answer = f"{answer}=7"  # which stands nowhere else
        ids = tokenizer(rf"{before} \boxed{{{answer}}}{behind}")["input_ids"]
        found = answer_tokens(tokenizer, ids, tokenizer.decode(ids))
        assert found is not None
        said = ids[found]
        assert answer.strip() in tokenizer.decode(said)
        assert answer.strip() not in tokenizer.decode(said[1:])
        assert answer.strip() not in tokenizer.decode(said[:-1])


def test_pieces_with_their_spaces() -> None:
    found, texts = place(pieces(), "I add 40 and 2\n#### 42 and 2")
    assert found is not None
    assert "".join(texts[found]).replace(" ", "") == "42and2"


@pytest.mark.parametrize("text", ["I do not know", r"\boxed{42", r"<think> and so on \boxed{5}", ""])
def test_no_answer_has_no_tokens(text: str) -> None:
    assert place(byte_level(258), text)[0] is None


def test_a_text_that_is_not_the_tokens_is_not_trusted() -> None:
    tokenizer = byte_level(258)
    ids = tokenizer(r"\boxed{42}, at last")["input_ids"]
    assert answer_tokens(tokenizer, ids, r"\boxed{42}, at last") == slice(7, 9)
    assert answer_tokens(tokenizer, ids, r"\boxed{42}, at once") is None
    assert answer_tokens(tokenizer, ids[:8], r"\boxed{42}, at last") is None


def sampled(*rows: tuple[str, float, str, list[float]]) -> Any:
    """Responses of question, reward, words and the probability of each word and of the end."""
    made = scored(*[row[:2] for row in rows], responses=[row[2] for row in rows])
    ids = [[*POLICY.tokenizer(words)["input_ids"], POLICY.tokenizer.eos_token_id] for _, _, words, _ in rows]
    width = max(map(len, ids))
    made.response_ids = torch.tensor([row + [POLICY.tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    made.response_mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in ids])
    chances = [row[3] + [1.0] * (width - len(row[3])) for row in rows]
    made.sampled_log_probs = torch.tensor(chances, dtype=torch.float64).log()
    return made


ROWS = [
    ("p", 1.0, r"a \boxed{ 4 2 }", [0.1, 0.2, 0.5, 0.75, 0.9, 1.0]),
    ("p", 1.0, r"\boxed{ 4 2 }", [0.5, 0.25, 0.5, 0.5, 1.0]),
    ("p", 0.0, r"b \boxed{ 7 }", [0.5, 0.5, 0.125, 0.5, 0.5]),
    ("p", NAN, r"\boxed{ 7 }", [0.5, 0.5, 0.5, 0.5]),
    ("q", 0.0, r"\boxed{ 1 }", [0.5, 0.875, 0.5, 0.5]),
    ("q", 0.0, "a b", [0.5, 0.5, 0.5]),
    ("r", 0.0, r"\boxed{ 1 }", [0.5, 1.0, 0.5, 0.5]),
]


def test_the_tokens_that_count() -> None:
    rollouts = sampled(*ROWS)
    answer = PolicyConfidence(POLICY).of(rollouts).tolist()
    assert answer == pytest.approx([0.625, 0.375, 0.125, 0.5, 0.875, NAN, 1.0], nan_ok=True)
    response = PolicyConfidence(POLICY, "response").of(rollouts).tolist()
    assert response[0] == pytest.approx((0.1 + 0.2 + 0.5 + 0.75 + 0.9 + 1.0) / 6)
    assert response[5] == pytest.approx(0.5)


def test_both_confidences_by_hand() -> None:
    evaluation = Evaluation()
    evaluation.confidence = PolicyConfidence(POLICY)
    evaluation.update(0, sampled(*ROWS), None)
    evaluation.update(0, sampled(("p", 1.0, r"\boxed{ 3 }", [0.5, 0.5, 0.5, 0.5])), None, greedy=True)
    metrics = evaluation.report(["sums"])
    pairs = evaluation.confidence.pairs(evaluation.last_problems["sums"])
    # p: two of three verdicts are about 42, which is right; q: one of two gives an answer; r has one response only
    assert pairs["agreement"][0].tolist() == [2 / 3, 0.5]
    assert pairs["agreement"][1].tolist() == [1.0, 0.0]
    assert pairs["token_probability"][0].tolist() == pytest.approx([0.625, 0.375, 0.125, 0.875, 1.0])
    assert pairs["token_probability"][1].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    for kind, pair in pairs.items():
        for name, value in confidence_metrics(*pair).items():
            assert metrics[f"val/sums/{kind}_{name}"] == value
    assert metrics["val/sums/agreement_calibration_error"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert metrics["val/sums/agreement_aurc"] == pytest.approx((0 + 1 / 2) / 2)
    assert metrics["val/sums/token_probability_auroc"] == pytest.approx((1 + 1) / 6)  # both above 0.125 alone
    assert metrics["val/sums/token_probability_accuracy"] == pytest.approx(2 / 5)


def test_what_there_is_nothing_of_is_left_out() -> None:
    evaluation = Evaluation()
    evaluation.confidence = PolicyConfidence(POLICY)
    evaluation.update(0, sampled(("p", 1.0, r"\boxed{ 3 }", [0.5] * 4), ("q", 0.0, "a", [0.5, 0.5])), None)
    evaluation.update(1, sampled(("p", 1.0, "a", [0.5, 0.5]), ("p", 0.0, "b", [0.5, 0.5])), None)
    kinds = {name.rsplit("/", 1)[0] for name in evaluation.report(["one", "two"]) if "aurc" in name}
    assert kinds == {"val/one", "val/all"}
    assert set(evaluation.confidence.pairs(evaluation.last_problems["one"])) == {"token_probability"}
    assert evaluation.confidence.pairs(evaluation.last_problems["two"]) == {}
