import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from toy_pipeline import Scored, Toy, loader, rollouts_of, trainer_of

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.callbacks.overlong_penalty import OverlongPenalty, overlong_penalty
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import Stage


class OfLength(Stage):
    """Responses of as many tokens as the prompt says; those of 10 and more were cut off."""

    provides = frozenset({"rollouts"})

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        lengths = torch.tensor([int(prompt.text) for prompt in batch.prompts])
        rollouts = rollouts_of(["1" for _ in batch.prompts])
        rollouts.response_mask = (torch.arange(12) < lengths[:, None]).float()
        rollouts.finish_reasons = ["length" if n >= 10 else "stop" for n in lengths.tolist()]
        batch.rollouts = rollouts


def fit(penalty: OverlongPenalty, *batches: list[str]) -> tuple[list[Rollouts], Trainer]:
    module = Toy()
    trainer = trainer_of(OfLength(), Scored(), penalty)
    trainer.fit(module, loader(*batches))
    return [batch.rollouts for batch in module.seen if batch.rollouts is not None], trainer


@pytest.mark.parametrize(
    ("buffer_tokens", "penalties"),
    [
        (4, [0, 0, -0.25, -0.5, -0.75, -1, -1]),
        (10, [-0.1, -0.6, -0.7, -0.8, -0.9, -1, -1]),
        (0, [0, 0, 0, 0, 0, 0, -1]),
    ],
)
def test_equation_13(buffer_tokens: int, penalties: Sequence[float]):
    lengths = torch.tensor([1.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0])
    torch.testing.assert_close(overlong_penalty(lengths, 10, buffer_tokens), torch.tensor(penalties).float())


def test_the_penalty_is_centred_and_no_part_of_the_reward():
    rollouts, trainer = fit(OverlongPenalty(10, 4, weight=2.0), ["6", "8"], ["10", "9"])
    assert [r.rewards.tolist() for r in rollouts] == [[1.0, 1.0], [1.0, 1.0]]
    assert rollouts[0].shaping.tolist() == [0.0, -1.0]
    # the first batch's mean is −0.25
    assert rollouts[1].shaping.tolist() == [2 * (-1 + 0.25), 2 * (-0.75 + 0.25)]
    assert trainer.logged_metrics["reward/overlong_penalty"] == -0.875


def test_truncated_responses_are_masked_where_that_is_asked_for():
    (rollouts,), trainer = fit(OverlongPenalty(10, 4, mask_truncated=True), ["6", "9", "10", "12"])
    assert rollouts.shaping[:2].tolist() == [0.0, -0.75]
    assert rollouts.shaping[2:].isnan().tolist() == [True, True]
    assert not rollouts.rewards.isnan().any()
    logged = trainer.logged_metrics
    assert logged["verifier/overlong_penalty/no_verdict"] == 2
    assert logged["verifier/overlong_penalty/errors"] == 0
    assert math.isclose(logged["reward/overlong_penalty"], -0.375)


@pytest.mark.parametrize("settings", [(10, 11), (10, -1)])
def test_a_buffer_outside_the_response_is_refused(settings: Any):
    with pytest.raises(InputError) as raised:
        OverlongPenalty(*settings)
    assert str(raised.value) == (
        f"`OverlongPenalty.buffer_tokens`={settings[1]} is not within the 10 tokens of `max_response_tokens`; "
        "use a fifth of them."
    )
