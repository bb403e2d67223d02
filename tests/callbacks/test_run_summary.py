import json
from pathlib import Path
from typing import Any

import lightning
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import data, fit, rl_module, sft_module, trainer_of

from sppo_lightning.callbacks import InitialValidation, RunSummary
from sppo_lightning.callbacks.run_summary import accuracies


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def validated(folder: Path, module: Any = None) -> dict[str, float]:
    lightning.seed_everything(1, verbose=False)
    return dict(trainer_of(folder).validate(module or rl_module(folder), data(), verbose=False)[0])


def by_kind(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """The same as `accuracies`, written out for these two sets."""
    return {
        "sampled": {name: metrics[f"val/{name}/avg@2"] for name in ("all", "short", "long")},
        "greedy": {name: metrics[f"val/{name}/greedy"] for name in ("all", "short", "long")},
    }


def close(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return set(found) == set(wanted) and all(found[k] == pytest.approx(v, abs=1e-6) for k, v in wanted.items())


class Stops(Callback):
    """Raises after some iterations, as the user's Ctrl-C or a defect would."""

    def __init__(self, after: int, error: type[BaseException] = RuntimeError) -> None:
        self.after, self.error = after, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after + 1:
            raise self.error("enough")


def test_before_and_after_are_what_validate_says_of_the_first_and_last_weights(tmp_path: Path, capsys) -> None:
    # 3 iterations, validated at 0 and 2: "after" needs one more validation
    trainer = fit(tmp_path, InitialValidation(), RunSummary(str(tmp_path / "out")), limit_train_batches=3)
    summary = summary_of(tmp_path / "out")
    first, last = by_kind(validated(tmp_path)), by_kind(validated(tmp_path, trainer.lightning_module))
    assert all(close(summary["before"][kind], first[kind]) for kind in ("sampled", "greedy"))
    assert all(close(summary["after"][kind], last[kind]) for kind in ("sampled", "greedy"))
    assert first["sampled"] != last["sampled"]
    assert [row["iteration"] for row in summary["validations"]] == [0, 2, 3]
    assert summary["critic_pearson"] == summary["validations"][-1]["metrics"]["val/all/critic_pearson"]
    assert (summary["iterations"], summary["updates"], summary["control"]) == (3, 6, None)
    table = capsys.readouterr().out
    for name in ("all", "short", "long"):
        assert f"{summary['before']['sampled'][name]:.3f}" in table
        assert f"{summary['after']['greedy'][name]:.3f}" in table
    assert (tmp_path / "out/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["learning_curve.png", "summary.json"]


def test_no_second_validation_of_the_same_weights(tmp_path: Path) -> None:
    fit(tmp_path, RunSummary(str(tmp_path)), limit_train_batches=4)
    assert [row["iteration"] for row in summary_of(tmp_path)["validations"]] == [2, 4]


class Notes(Callback):
    """The module's own numbers, iteration by iteration."""

    def __init__(self) -> None:
        self.phases: list[dict[str, float]] = []
        self.rewards: list[float] = []
        self.lengths: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.phases.append(dict(pl_module.last_phase_seconds))
        self.rewards.append(float(batch.rollouts.rewards.mean()))
        self.lengths.append(sum(map(float, batch.rollouts.response_mask.flatten())) / 16)


def test_curve_and_seconds_add_up(tmp_path: Path) -> None:
    notes = Notes()
    fit(tmp_path, notes, InitialValidation(), RunSummary(str(tmp_path)))
    summary, curve = summary_of(tmp_path), summary_of(tmp_path)["curve"]
    assert [row["iteration"] for row in curve] == [1, 2, 3, 4]
    assert [row["reward"] for row in curve] == pytest.approx(notes.rewards, abs=1e-6)
    assert [row["response_tokens"] for row in curve] == pytest.approx(notes.lengths)
    assert curve[0]["value"] == 0.5  # the head starts at zero
    assert curve[3]["value"] != 0.5
    assert all(set(row) == {"iteration", "seconds", "reward", "value", "response_tokens"} for row in curve)
    seconds = summary["seconds"]
    for phase in ("rollout", "verify", "update"):
        assert seconds[phase] == pytest.approx(sum(row[phase] for row in notes.phases))
    assert seconds["validation"] > 0
    parts = seconds["rollout"] + seconds["verify"] + seconds["update"]
    assert parts <= curve[-1]["seconds"] <= seconds["total"] - seconds["validation"] + 1e-9
    times = [row["seconds"] for row in curve]
    assert times == sorted(times)
    assert 0 <= times[0] < seconds["total"]
    assert 50 < summary["peak_memory_mb"] < 20_000
    assert ("peak_gpu_memory_mb" in summary) is False


def test_without_a_critic_there_is_no_foresight(tmp_path: Path) -> None:
    from sppo_lightning.advantages import SequenceAdvantage

    class Plain(SequenceAdvantage):
        needs_critic = False

        def __call__(self, rollouts, rewards, values):
            return rewards

    fit(tmp_path, RunSummary(str(tmp_path)), module=rl_module(tmp_path, critic=False, advantage=Plain()))
    summary = summary_of(tmp_path)
    assert summary["critic_pearson"] is None
    assert [row["value"] for row in summary["curve"]] == [None] * 4


def test_supervised_learning_has_a_loss(tmp_path: Path) -> None:
    fit(tmp_path, RunSummary(str(tmp_path)), module=sft_module(), max_epochs=2)
    curve = summary_of(tmp_path)["curve"]
    assert len(curve) == 8
    assert all(set(row) == {"iteration", "seconds", "loss"} for row in curve)
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[0]["loss"] == pytest.approx(3.7, abs=0.8)  # ln 42 = 3.74: 42 words, uniform


def test_a_resumed_run_covers_both_halves(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    fit(tmp_path, InitialValidation(), RunSummary(str(whole)))
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    halves = InitialValidation(), RunSummary(str(tmp_path / "halves")), checkpoints
    with pytest.raises(RuntimeError, match="enough"):
        fit(tmp_path, *halves, Stops(after=3), enable_checkpointing=True)
    broken = summary_of(tmp_path / "halves")
    assert (broken["iterations"], broken["updates"]) == (3, 6)
    again = InitialValidation(), RunSummary(str(tmp_path / "halves"))
    fit(tmp_path, *again, ckpt_path=tmp_path / "step=6.ckpt")
    resumed, undisturbed = summary_of(tmp_path / "halves"), summary_of(whole)
    assert (resumed["iterations"], resumed["updates"]) == (4, 8)
    for key in ("reward", "value", "response_tokens"):
        assert [row[key] for row in resumed["curve"]] == [row[key] for row in undisturbed["curve"]]
    for key in ("before", "after", "critic_pearson"):
        assert resumed[key] == undisturbed[key]
    assert [row["iteration"] for row in resumed["validations"]] == [0, 2, 4]
    times = [row["seconds"] for row in resumed["curve"]]
    assert times == sorted(times)
    assert times[:3] == [row["seconds"] for row in broken["curve"]]
    assert resumed["seconds"]["total"] > broken["curve"][-1]["seconds"]
    assert resumed["seconds"]["update"] > broken["seconds"]["update"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_what_there_is(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(tmp_path, InitialValidation(), RunSummary(str(tmp_path)), Stops(after=1, error=error))
    summary = summary_of(tmp_path)
    assert (summary["iterations"], summary["updates"]) == (1, 2)
    assert summary["before"] == accuracies(summary["validations"][0]["metrics"])
    assert summary["after"] is None


def test_a_run_refused_before_the_first_update_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("of an earlier run")
    with pytest.raises(RuntimeError):
        fit(tmp_path, RunSummary(str(tmp_path)), Stops(after=0))
    assert (tmp_path / "summary.json").read_text() == "of an earlier run"


def test_the_only_set_is_all() -> None:
    metrics = {"val/gsm8k/avg@4": 0.25, "val/gsm8k/greedy": 0.5, "val/gsm8k/pass@4": 0.75}
    assert accuracies(metrics) == {
        "sampled": {"all": 0.25, "gsm8k": 0.25},
        "greedy": {"all": 0.5, "gsm8k": 0.5},
    }


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    summary = RunSummary(str(tmp_path))
    summary.curve = [{"iteration": 1, "seconds": 0.5, "loss": float("nan")}]
    summary._write()
    assert summary_of(tmp_path)["curve"] == [{"iteration": 1, "seconds": 0.5, "loss": None}]
