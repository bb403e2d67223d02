import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from toy_pipeline import Scored, Toy, loader, rollouts_of, trainer_of

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.callbacks import LengthPenalty, Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import Stage
from sppo_lightning.verification.lengths import Cosine, Linear, Overlong


class OfLength(Stage):
    """Responses of as many tokens as the prompt says, before the word itself; those of 10 and more were cut off."""

    provides = frozenset({"rollouts"})

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        words = [prompt.text.split() for prompt in batch.prompts]
        lengths = torch.tensor([int(tokens) for tokens, *_ in words])
        rollouts = rollouts_of([rest[0] if rest else "1" for _, *rest in words])
        rollouts.response_mask = (torch.arange(12) < lengths[:, None]).float()
        rollouts.finish_reasons = ["length" if n >= 10 else "stop" for n in lengths.tolist()]
        batch.rollouts = rollouts


def judge(text: str) -> float | None:
    return None if text == "?" else float(text)


def fit(
    penalty: LengthPenalty, *batches: list[str], first: Verifier | None = None
) -> tuple[list[Rollouts], Trainer]:
    module = Toy()
    trainer = trainer_of(OfLength(), first or Scored(judge), penalty)
    trainer.fit(module, loader(*batches))
    return [batch.rollouts for batch in module.seen if batch.rollouts is not None], trainer


def test_the_penalty_is_centred_and_no_part_of_the_reward():
    rollouts, trainer = fit(LengthPenalty(10, Overlong(4), weight=2.0), ["6", "8"], ["10", "9"])
    assert [r.rewards.tolist() for r in rollouts] == [[1.0, 1.0], [1.0, 1.0]]
    assert rollouts[0].shaping.tolist() == [0.0, -1.0]
    # the first batch's mean is −0.25
    assert rollouts[1].shaping.tolist() == [2 * (-1 + 0.25), 2 * (-0.75 + 0.25)]
    assert trainer.logged_metrics["reward/length_penalty"] == -0.875


def test_truncated_responses_are_masked_where_that_is_asked_for():
    (rollouts,), trainer = fit(LengthPenalty(10, Overlong(4), mask_truncated=True), ["6", "9", "10", "12"])
    assert rollouts.shaping[:2].tolist() == [0.0, -0.75]
    assert rollouts.shaping[2:].isnan().tolist() == [True, True]
    assert not rollouts.rewards.isnan().any()
    logged = trainer.logged_metrics
    assert logged["verifier/length_penalty/no_verdict"] == 2
    assert logged["verifier/length_penalty/errors"] == 0
    assert math.isclose(logged["reward/length_penalty"], -0.375)


def test_a_curve_that_asks_for_it_is_told_what_is_correct():
    (rollouts,), _ = fit(LengthPenalty(10, Cosine()), ["5 1", "5 0", "12 1", "5 ?"])
    scores = rollouts.scores["length_penalty"].values
    torch.testing.assert_close(scores[:3], torch.tensor([0.5, -0.5, -1.0]))
    assert scores[3].isnan()  # nobody knows whether it is correct


def test_a_penalty_for_correct_responses_only():
    (rollouts,), _ = fit(LengthPenalty(10, Linear(), only_if_correct=True), ["5 1", "5 0"])
    assert rollouts.shaping.tolist() == [-0.5, 0.0]


def test_what_asks_for_correctness_comes_after_what_judges():
    assert LengthPenalty(10, Cosine()).requires == {"rollouts", "scores"}
    assert LengthPenalty(10, Linear()).requires == {"rollouts"}
    with pytest.raises(InputError, match="move Scored above LengthPenalty"):
        trainer_of(OfLength(), LengthPenalty(10, Cosine()), Scored()).fit(Toy(), loader(["1"]))
    stages = [OfLength(), Scored(name="a"), LengthPenalty(10, Cosine()), Scored(name="b")]
    with pytest.raises(InputError, match="'length_penalty', which asks whether a response is correct, before 'b'"):
        trainer_of(*stages).fit(Toy(), loader(["1"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((10, Overlong(11)), "`Overlong.buffer_tokens`=11 is not within the 10 tokens"),
        ((0, Linear()), "`LengthPenalty.max_response_tokens`=0 leaves no room"),
    ],
)
def test_settings_that_cannot_be(settings: Any, words: str):
    with pytest.raises(InputError, match=words):
        LengthPenalty(*settings)
