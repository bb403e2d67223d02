import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_reward import RESPONSES, by_hand, rendered, save_reward_model
from toy_pipeline import Recites, Scored, Toy, loader, trainer_of

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import RewardModelVerifier
from sppo_lightning.errors import InputError

PROMPTS = [Prompt("2+3=", "5", "sums", row) for row in range(len(RESPONSES))]


def ready(folder: str, **settings: Any) -> RewardModelVerifier:
    verifier = RewardModelVerifier(folder, **({"dtype": "float32"} | settings))
    verifier.setup(trainer_of(Recites(), verifier), Toy(), "fit")
    return verifier


def test_scores_and_their_sigmoid(tmp_path: Path):
    folder = save_reward_model(tmp_path)
    expected = [by_hand(folder, rendered("2+3=", text)) for text in RESPONSES]
    raw = ready(folder, role="shaping", squash=False)
    assert raw.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5)
    squashed = [1 / (1 + math.exp(-score)) for score in expected]
    assert ready(folder).score(PROMPTS, RESPONSES) == pytest.approx(squashed, abs=1e-5)
    half = ready(folder, dtype="bfloat16").score(PROMPTS, RESPONSES)
    assert half == pytest.approx(squashed, abs=0.05)
    assert half != pytest.approx(squashed, abs=1e-6)


def test_what_is_too_long_has_no_verdict(tmp_path: Path):
    folder = save_reward_model(tmp_path)
    tokens = [len(rendered("2+3=", text)) for text in RESPONSES]
    limit = sorted(tokens)[2]
    found = ready(folder, max_tokens=limit).score(PROMPTS, RESPONSES)
    assert [score is None for score in found] == [count > limit for count in tokens]
    assert sum(score is None for score in found) == 2
    room = 256 - len(rendered("2+3=", ""))  # of the model itself
    ends = ready(folder).score(PROMPTS[:2], ["5" * room, "5" * (room + 1)])
    assert [score is None for score in ends] == [False, True]


def test_a_score_that_is_no_finite_number_is_no_verdict(tmp_path: Path):
    verifier = ready(save_reward_model(tmp_path))
    assert verifier.reward_model is not None
    for value in (math.nan, math.inf):
        verifier.reward_model.model.score.weight.data.fill_(value)
        assert verifier.score(PROMPTS, RESPONSES) == [None] * len(RESPONSES)


def test_the_sigmoid_of_large_scores(tmp_path: Path):
    verifier = ready(save_reward_model(tmp_path))
    assert verifier.reward_model is not None
    verifier.reward_model.scores = lambda ids, tokens: [-1e4, 0.0, 1e4]  # type: ignore[method-assign]
    assert verifier.score(PROMPTS[:3], RESPONSES[:3]) == [0.0, 0.5, 1.0]


class Spy(RewardModelVerifier):
    """Keeps the scores that it gave, and a weak reference to its model."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        scores = super().score(prompts, responses)
        assert self.reward_model is not None
        self.last = weakref.ref(self.reward_model.model)
        self.seen = [*getattr(self, "seen", []), *zip(prompts, responses, scores, strict=True)]
        return scores


def test_a_run_with_a_second_outcome(tmp_path: Path):
    folder = save_reward_model(tmp_path / "reward")
    learned = Spy(folder, name="learned", weight=3.0, truncated="scored", dtype="float32")
    recorder = tiny_run.Recorder()
    trainer = tiny_run.trainer_of([*tiny_run.stages(), learned, recorder], max_steps=2)
    module = tiny_run.sppo(tmp_path)
    trainer.fit(module, tiny_run.data(validation=()))

    assert len(learned.seen) == 8
    for prompt, response, score in learned.seen:
        assert score == pytest.approx(
            1 / (1 + math.exp(-by_hand(folder, rendered(prompt.text, response)))), abs=1e-5
        )
    logged = recorder.iterations[0]
    mean = sum(score for *_, score in learned.seen) / 8
    right = sum(response.split()[:1] == ["a"] for _, response, _ in learned.seen) / 8
    assert logged["reward/learned"] == pytest.approx(mean)
    assert logged["reward/mean"] == pytest.approx((3 * mean + right) / 4)

    assert learned.reward_model is None
    gc.collect()
    assert learned.last() is None
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["state_dict"].keys() == module.state_dict().keys()
    assert not any("learned" in name or "reward" in name for name in saved["state_dict"])
    assert saved["callbacks"]["Spy[learned]"].keys() == {"total", "number"}


def test_the_model_is_freed_where_the_run_fails(tmp_path: Path):
    verifier = RewardModelVerifier(save_reward_model(tmp_path), dtype="float32")
    module = Toy()
    module.training_step = lambda batch, batch_idx: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer_of(Recites(), verifier).fit(module, loader(["5"]))
    assert verifier.reward_model is None


def test_what_cannot_be_loaded_is_said_before_the_first_step():
    module = Toy()
    with pytest.raises(InputError, match=r"`RewardModelVerifier.model`='./none' does not exist"):
        trainer_of(Recites(), RewardModelVerifier("./none")).fit(module, loader(["5"]))
    assert module.seen == []


def test_beside_it_correctness_is_the_other_outcomes(tmp_path: Path):
    folder = save_reward_model(tmp_path)
    gated = RewardModelVerifier(folder, only_if_correct=True)
    bonus = Scored(lambda _: 1.0, name="bonus", role="shaping", only_if_correct=True)
    module = Toy()
    judge = Scored(lambda text: float(text == "5"), name="right")
    trainer_of(Recites(), judge, gated, bonus).fit(module, loader(["5", "6?"]))
    rollouts = module.seen[0].rollouts
    assert rollouts is not None
    assert rollouts.correct.tolist() == [True, False]
    assert rollouts.shaping.tolist() == [1.0, 0.0]
    assert 0.5 < rollouts.rewards[0] < 1
    assert rollouts.rewards[1] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"squash": False}, r"`RewardModelVerifier.squash`=False leaves scores that are not in \[0, 1\]"),
        ({"dtype": "int8"}, "`RewardModelVerifier.dtype`=int8 is unknown; use bfloat16 or float16 or float32"),
        ({"device": "abacus"}, "`RewardModelVerifier.device`='abacus' names no device"),
        ({"max_tokens": 0}, "`RewardModelVerifier.max_tokens`=0 leaves nothing to read"),
        ({"micro_batch_tokens": 0}, "`RewardModelVerifier.micro_batch_tokens`=0 leaves nothing to read"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        RewardModelVerifier("any/model", **settings)


def test_settings_that_the_model_cannot_take(tmp_path: Path):
    folder = save_reward_model(tmp_path)
    with pytest.raises(InputError, match="`RewardModelVerifier.max_tokens`=257 is more than the 256 that"):
        ready(folder, max_tokens=257)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="`RewardModelVerifier.device`=cuda:0 cannot take"):
            ready(folder, device="cuda:0")
