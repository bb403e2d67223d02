"""Runs that collapse for real: each is told of by its own symptom."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import ByRow, FirstWord, Recorder, data, sft, sppo, stages, trainer_of

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import CollapseMonitor, RolloutGeneration, Verifier
from sppo_lightning.collapse import CollapseLimits
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.objectives import TokenClipObjective
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.warmup import CriticWarmup


class ByLength(Verifier):
    """The fewer words, the better, or the more; `sign` says which."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.sign = sign

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [min(1.0, max(0.0, 0.5 - self.sign * (len(r.split()) - 4) / 16)) for r in responses]


def run(
    folder: Path,
    verifier: Verifier,
    tokens: int = 2,
    epochs: int = 4,
    monitor: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> tuple[list[dict[str, float]], CollapseMonitor]:
    """Four iterations per epoch: what was logged, and the monitor with a window of 4."""
    rates = {name: settings.pop(name) for name in ("policy_optimizer", "critic_optimizer") if name in settings}
    module = sppo(folder, **settings)
    for name, rate in rates.items():
        setattr(module, name, GroupOptimizer(lr=rate))
    recorder = Recorder()
    watching = CollapseMonitor(**{"window": 4, "uniform_iterations": 3, "critic_window": 8} | (monitor or {}))
    saved = ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)
    callbacks = [RolloutGeneration(Sampling(max_new_tokens=tokens)), verifier, watching, recorder, saved]
    trainer = trainer_of(callbacks, max_epochs=epochs, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(module, data(), ckpt_path=ckpt_path, weights_only=False)
    return recorder.iterations, watching


def warnings_of(recwarn: pytest.WarningsRecorder) -> list[str]:
    return [str(w.message) for w in recwarn if str(w.message).startswith("At iteration ")]


def symptoms(recwarn: pytest.WarningsRecorder) -> list[str]:
    """What the warnings say, without the numbers."""
    return [text.split(":")[0].split(" ", 3)[3] for text in warnings_of(recwarn)]


def mean(logged: list[dict[str, float]], metric: str, first: int, last: int) -> float:
    return sum(row[metric] for row in logged[first - 1 : last]) / (last - first + 1)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("reward", "what"), [(0.0, "to learn from"), (1.0, "left to learn")])
def test_a_verifier_that_always_says_the_same(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, reward: float, what: str
):
    run(tmp_path, ByRow(lambda row: reward), epochs=2, monitor={"limits": CollapseLimits(truncated_fraction=None)})
    [told] = warnings_of(recwarn)
    assert told.startswith(
        f"At iteration 3 there is nothing {what}: `reward/mean` is {reward:.0f} in each of the last 3 iterations. It "
    )


@pytest.mark.filterwarnings("default")
def test_one_word_that_is_paid_for_ends_exploration(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    logged, watching = run(tmp_path, FirstWord(), monitor={"limits": CollapseLimits(truncated_fraction=None)})
    first = mean(logged, "policy/entropy", 1, 4)
    when = next(i for i in range(4, 17) if mean(logged, "policy/entropy", i - 3, i) < 0.2 * first)
    assert 4 < when < 16
    now = mean(logged, "policy/entropy", when - 3, when)
    [told] = [text for text in warnings_of(recwarn) if "hardly explores" in text]
    assert told.startswith(
        f"At iteration {when} the policy hardly explores any more: `policy/entropy` (nats) has a mean of {now:.3g} over "
        f"the last 4 iterations, from {first:.3g} over the first 4. It often comes from"
    )
    assert watching.collapse.present["entropy_collapse"] == 0


@pytest.mark.filterwarnings("default")
def test_a_rate_that_is_far_too_high(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    """All is lost in the first update: the start is no measure, the absolute bound is."""
    logged, _ = run(tmp_path, FirstWord(), epochs=2, learning_rate=1.0)
    assert logged[1]["policy/entropy"] < 0.02
    assert set(symptoms(recwarn)) >= {"the policy hardly explores any more", "there is nothing to learn from"}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("sign", "metric"), [(1, "become short"), (-1, "are cut off")])
def test_a_length_that_is_paid_for(tmp_path: Path, recwarn: pytest.WarningsRecorder, sign: int, metric: str):
    logged, _ = run(tmp_path, ByLength(sign), tokens=14, epochs=6)
    lengths = [row["rollout/response_tokens_mean"] for row in logged]
    assert sum(lengths[-4:]) / sum(lengths[:4]) < 0.3 if sign > 0 else lengths[-1] == 14
    assert [
        text for text in symptoms(recwarn) if text in ("responses have become short", "many responses are cut off")
    ]
    assert any(metric in text for text in symptoms(recwarn))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("room", [0.0, 0.5])
def test_steps_that_leave_the_clip_range(tmp_path: Path, recwarn: pytest.WarningsRecorder, room: float):
    """The same steps with no room at all, so that whatever the first of two updates does is clipped, and with some."""
    limits = CollapseLimits(truncated_fraction=None, brier_skill=None, clip_fraction=0.2)
    objective = TokenClipObjective(clip_low=room, clip_high=room)
    rewards = ByRow(lambda row: float(row % 2))
    logged, _ = run(
        tmp_path, rewards, epochs=2, learning_rate=0.01, objective=objective, monitor={"limits": limits}
    )
    assert (mean(logged, "policy/clip_fraction", 1, 4) > 0.2) == (room == 0)
    assert symptoms(recwarn) == ([] if room else ["updates leave the clip range at once"])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("warm", [0, 1000])
def test_a_critic_that_is_worse_than_a_constant(tmp_path: Path, recwarn: pytest.WarningsRecorder, warm: int):
    """Its rate is absurd; while it warms up nobody wonders."""
    rates = {"policy_optimizer": 0.0, "critic_optimizer": 3.0}
    warmup = CriticWarmup(updates=warm, max_updates=warm) if warm else None
    monitor = {"limits": CollapseLimits(truncated_fraction=None), "uniform_iterations": 99}
    logged, watching = run(tmp_path, FirstWord(), monitor=monitor, critic_warmup=warmup, **rates)
    assert [row["critic/brier_skill"] < 0 for row in logged].count(True) > 12
    assert symptoms(recwarn) == ([] if warm else ["the critic foresees less than the mean reward does"])
    # an iteration whose rewards all agree has no skill, although Lightning goes on to show the one before
    spread = [row for row in logged if 0 < row["reward/mean"] < 1]
    assert len(spread) < len(logged)
    skills = watching.collapse.series["critic/brier_skill"].entries
    assert len(skills) == (0 if warm else min(8, len(spread)))


@pytest.mark.filterwarnings("default")
def test_a_healthy_run_says_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    monitor = {"limits": CollapseLimits(truncated_fraction=None), "critic_window": 50}
    run(tmp_path, FirstWord(), epochs=3, learning_rate=1e-3, monitor=monitor)
    assert warnings_of(recwarn) == []


@pytest.mark.filterwarnings("default")
def test_a_resumed_run_does_not_tell_again(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    _, whole = run(tmp_path, ByRow(lambda row: 0.0), epochs=3)
    recwarn.clear()
    file = tmp_path / "epoch=0.ckpt"
    state = torch.load(file, weights_only=True)["callbacks"]["CollapseMonitor"]  # plain types
    assert state["present"]["all_zero"] == 0
    _, resumed = run(tmp_path, ByRow(lambda row: 0.0), epochs=3, ckpt_path=str(file))
    assert resumed.state_dict() == whole.state_dict()
    assert "there is nothing to learn from" not in symptoms(recwarn)


def test_supervised_learning_is_left_alone():
    watching = CollapseMonitor(window=1)
    trainer_of([watching]).fit(sft(), data(()))
    assert watching.state_dict()["series"]["policy/entropy"]["entries"] == []


def test_it_stands_below_what_it_looks_at(tmp_path: Path):
    rollout, verifier = stages()
    with pytest.raises(InputError, match="CollapseMonitor"):
        trainer_of([CollapseMonitor(), rollout, verifier]).fit(sppo(tmp_path), data(()))


@pytest.mark.parametrize("name", ["window", "uniform_iterations", "critic_window"])
def test_a_window_of_nothing(name: str):
    with pytest.raises(InputError, match=f"^`CollapseMonitor.{name}`=0 is too small; use 1 or more.$"):
        CollapseMonitor(**{name: 0})
