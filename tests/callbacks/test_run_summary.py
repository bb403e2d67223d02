import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from tiny_run import ByRow, Recorder, data, sft, sppo, stages, trainer_of

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.initial_validation import InitialValidation
from sppo_lightning.callbacks.run_summary import RunSummary
from sppo_lightning.callbacks.verifier import Verifier

PNG = b"\x89PNG\r\n\x1a\n"


def run(
    folder: Path,
    *callbacks: Callback,
    ckpt_path: str | None = None,
    validation_sets=("easy", "hard"),
    **settings: Any,
) -> tuple[dict[str, Any], Recorder]:
    """The summary of a run of SPPO with a validation before it and one every other iteration."""
    recorder = Recorder()
    chain = [*stages(), RunSummary(str(folder / "summary")), InitialValidation(), recorder, *callbacks]
    trainer = trainer_of(chain, **({"val_check_interval": 2} | settings))
    trainer.fit(sppo(folder), datamodule=data(validation_sets), ckpt_path=ckpt_path)
    return read(folder), recorder


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary" / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[dict[str, Any], Recorder]:
    return run(folder)


def test_before_is_what_validate_gives_and_after_the_last_validation(
    undisturbed: tuple[dict[str, Any], Recorder], folder: Path
) -> None:
    summary, recorder = undisturbed
    alone = trainer_of(stages()).validate(sppo(folder), datamodule=data(), verbose=False)[0]
    assert summary["before"] == {
        "sampled": pytest.approx({name: alone[f"val/{name}/avg@2"] for name in ("all", "easy", "hard")}, abs=1e-6),
        "greedy": pytest.approx({name: alone[f"val/{name}/greedy"] for name in ("all", "easy", "hard")}, abs=1e-6),
    }
    last = recorder.validations[-1]
    assert summary["after"]["sampled"]["hard"] == pytest.approx(last["val/hard/avg@2"], abs=1e-6)
    assert summary["after"]["greedy"]["all"] == pytest.approx(last["val/all/greedy"], abs=1e-6)
    assert summary["critic_pearson"] == pytest.approx(last["val/all/critic_pearson"], abs=1e-6)
    assert summary["control"] is None
    assert (folder / "summary" / "learning_curve.png").read_bytes().startswith(PNG)
    assert sorted(path.name for path in (folder / "summary").iterdir()) == ["learning_curve.png", "summary.json"]


def test_the_curve_holds_what_lightning_logged(undisturbed: tuple[dict[str, Any], Recorder]) -> None:
    summary, recorder = undisturbed
    curve = summary["curve"]
    assert summary["iterations"] == 4
    assert summary["updates"] == 8  # 8 responses per iteration, mini-batches of 4
    assert [row["iteration"] for row in curve] == [1, 2, 3, 4]
    assert [row["reward"] for row in curve] == pytest.approx([r["reward/mean"] for r in recorder.iterations])
    assert [row["value"] for row in curve] == pytest.approx(
        [r["critic/value_mean"] for r in recorder.iterations], abs=1e-6
    )
    assert curve[0]["value"] == 0.5  # the value head starts at zero
    lengths = [r["rollout/response_tokens_mean"] for r in recorder.iterations]
    assert [row["response_tokens"] for row in curve] == pytest.approx(lengths)
    assert [row["iteration"] for row in summary["validations"]] == [0, 2, 4]
    assert summary["validations"][1]["metrics"] == pytest.approx(recorder.validations[1], abs=1e-6)


def test_the_seconds_add_up(undisturbed: tuple[dict[str, Any], Recorder]) -> None:
    summary, recorder = undisturbed
    seconds = summary["seconds"]
    for phase in ("rollout", "verify", "update"):
        assert seconds[phase] == pytest.approx(sum(row[phase] for row in recorder.phases), abs=1e-5)
    total = seconds["total"]
    assert seconds["validation"] > 0
    assert sum(seconds.values()) <= 2 * total
    times = [row["seconds"] for row in summary["curve"]]
    assert times == sorted(times)
    assert times[-1] <= total - seconds["validation"]
    assert summary["validations"][0]["seconds"] <= times[0]
    assert 100 < summary["peak_memory_mb"] < 16_000


def test_a_run_that_does_not_end_on_a_validation_has_one_more(tmp_path: Path) -> None:
    summary, recorder = run(tmp_path, max_steps=6)
    assert [row["iteration"] for row in summary["validations"]] == [0, 2, 3]
    after = {name: recorder.validations[2][f"val/{name}/avg@2"] for name in ("all", "easy", "hard")}
    assert summary["after"]["sampled"] == pytest.approx(after, abs=1e-6)


def test_after_is_what_validate_gives_of_the_weights_that_are_left(tmp_path: Path) -> None:
    module = sppo(tmp_path)
    chain = [*stages(), InitialValidation(), RunSummary(str(tmp_path / "summary"))]
    trainer_of(chain, val_check_interval=2, max_steps=6).fit(module, datamodule=data())
    alone = trainer_of(stages()).validate(module, datamodule=data(), verbose=False)[0]
    summary = read(tmp_path)
    for kind, name in (("sampled", "avg@2"), ("greedy", "greedy")):
        rates = {dataset: alone[f"val/{dataset}/{name}"] for dataset in ("all", "easy", "hard")}
        assert summary["after"][kind] == pytest.approx(rates, abs=1e-6)
    assert summary["before"] != summary["after"]


def test_the_only_validation_set_counts_as_all(tmp_path: Path) -> None:
    summary, recorder = run(tmp_path, validation_sets=("sums",))
    rate = recorder.validations[-1]["val/sums/avg@2"]
    assert summary["after"]["sampled"] == pytest.approx({"all": rate, "sums": rate}, abs=1e-6)
    assert summary["critic_pearson"] == pytest.approx(recorder.validations[-1]["val/sums/critic_pearson"], abs=1e-6)


def test_a_resumed_run_is_summed_up_as_a_whole(
    undisturbed: tuple[dict[str, Any], Recorder], tmp_path: Path
) -> None:
    whole, _ = undisturbed
    saver = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=1, save_top_k=1, save_last=True)
    half, _ = run(tmp_path / "half", saver, max_steps=6, enable_checkpointing=True)
    assert half["iterations"] == 3
    second, recorder = run(tmp_path / "half", max_steps=8, ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(recorder.iterations) == 1
    assert second["iterations"] == 4
    assert second["updates"] == 8
    for key in ("before", "after", "critic_pearson"):
        assert second[key] == whole[key]
    for column in ("iteration", "reward", "value", "response_tokens"):
        assert [row[column] for row in second["curve"]] == [row[column] for row in whole["curve"]]
    assert [row["metrics"] for row in second["validations"]] == [row["metrics"] for row in whole["validations"]]
    times = [row["seconds"] for row in second["curve"]]
    assert times == sorted(times)
    assert times[:3] == [row["seconds"] for row in half["curve"]]
    assert second["seconds"]["update"] > half["seconds"]["update"]
    assert second["seconds"]["total"] >= sum(v for k, v in second["seconds"].items() if k != "total")


def test_an_interrupted_run_leaves_what_there_is(tmp_path: Path) -> None:
    chain = [*stages(), InitialValidation(), RunSummary(str(tmp_path / "summary")), Recorder(stop_at=3)]
    with pytest.raises(RuntimeError, match="the machine went away"):
        trainer_of(chain, val_check_interval=2).fit(sppo(tmp_path), datamodule=data())
    summary = read(tmp_path)
    assert summary["iterations"] == 3
    assert [row["iteration"] for row in summary["validations"]] == [0, 2]
    assert (tmp_path / "summary" / "learning_curve.png").read_bytes().startswith(PNG)


class Interrupts(Callback):
    """Presses Ctrl-C after the first iteration."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_leaves_what_there_is(tmp_path: Path) -> None:
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path, Interrupts())
    summary = read(tmp_path)
    assert (summary["iterations"], summary["updates"], summary["after"]) == (1, 2, None)
    assert summary["before"]["sampled"]["all"] == summary["validations"][0]["metrics"]["val/all/avg@2"]


def test_a_run_that_never_trained_leaves_an_earlier_summary_alone(tmp_path: Path) -> None:
    (tmp_path / "summary").mkdir()
    (tmp_path / "summary" / "summary.json").write_text("{}")
    chain = [*stages(), RunSummary(str(tmp_path / "summary")), InitialValidation(min_pass_rate=1.0)]
    with pytest.raises(ValueError, match="min_pass_rate"):
        trainer_of(chain).fit(sppo(tmp_path), datamodule=data())
    assert read(tmp_path) == {}


def test_supervised_learning_has_a_loss_and_no_reward(tmp_path: Path) -> None:
    recorder = Recorder()
    chain = [*stages(), RunSummary(str(tmp_path / "summary")), recorder]
    trainer_of(chain, val_check_interval=100).fit(sft(), datamodule=data())
    summary = read(tmp_path)
    assert [row["loss"] for row in summary["curve"]] == pytest.approx(
        [row["sft/loss"] for row in recorder.iterations], abs=1e-6
    )
    assert set(summary["curve"][0]) == {"iteration", "seconds", "loss"}
    assert summary["before"] is None  # the only validation came after the last update
    assert summary["after"]["sampled"]["all"] == pytest.approx(recorder.validations[0]["val/all/avg@2"], abs=1e-6)
    assert summary["critic_pearson"] is None


class Later(Verifier):
    """Nothing is solved from the second validation on, so that there is no area under a curve."""

    ends = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends += 1

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [float(prompt.row == 0 and not self.ends) for prompt in prompts]


def test_what_a_validation_did_not_measure_is_not_there(tmp_path: Path) -> None:
    chain = [*stages(Later()), InitialValidation(), RunSummary(str(tmp_path / "summary"))]
    trainer_of(chain, val_check_interval=100, max_steps=2).fit(sppo(tmp_path), datamodule=data(("held_out",)))
    first, second = [row["metrics"] for row in read(tmp_path)["validations"]]
    assert set(first) - set(second) == {"val/held_out/critic_auroc", "val/held_out/critic_brier_skill"}
    assert (first["val/held_out/avg@2"], second["val/held_out/avg@2"]) == (0.125, 0.0)


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    chain = [*stages(ByRow(lambda row: None)), RunSummary(str(tmp_path / "summary"))]
    trainer_of(chain, max_steps=2).fit(sppo(tmp_path), datamodule=data(()))
    summary = read(tmp_path)
    assert summary["curve"][0]["reward"] is None
    assert (summary["before"], summary["after"], summary["validations"]) == (None, None, [])


def noted(*validations: tuple[int, dict[str, float]]) -> RunSummary:
    """A summary of 10 iterations and 20 seconds."""
    summary = RunSummary(title="a run", final_validation=False)
    rows = [{"iteration": i, "seconds": 1.0 * i, "metrics": metrics} for i, metrics in validations]
    curve = [{"iteration": i + 1, "seconds": 1.0 * i, "reward": 0.5, "value": None} for i in range(10)]
    phases = {"rollout": 9.0, "verify": 1.0, "update": 5.0, "validation": 3.0}
    memory = {"memory": 1.0, "gpu_memory": 0.0}
    state = {"curve": curve, "validations": rows, "updates": 10, "seconds": phases, "total_seconds": 20.0}
    summary.load_state_dict(state | memory)
    return summary


def printed(summary: RunSummary) -> list[list[str]]:
    """The words of each line that the tables print."""
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in summary.tables():
        console.print(table)
    return [
        line.translate(dict.fromkeys(map(ord, "│┃"), " ")).split() for line in console.export_text().split("\n")
    ]


def test_the_table_compares_before_with_after() -> None:
    before = {
        "val/all/avg@4": 0.5,
        "val/easy/avg@4": 0.75,
        "val/hard/avg@4": 0.25,
        "val/hard/greedy": 0.125,
        "val/all/greedy": 0.125,
    }
    after = {
        "val/all/avg@4": 0.625,
        "val/easy/avg@4": 0.75,
        "val/hard/avg@4": 0.125,
        "val/hard/greedy": 0.375,
        "val/all/greedy": 0.375,
    }
    lines = printed(noted((0, before), (10, after)))
    assert ["all", "0.500", "0.625", "+0.125", "0.125", "0.375", "+0.250"] in lines
    assert ["easy", "0.750", "0.750", "+0.000", "–", "–", "–"] in lines
    assert ["hard", "0.250", "0.125", "-0.125", "0.125", "0.375", "+0.250"] in lines
    assert not any("of" in line for line in lines)


def test_the_table_shares_out_the_time() -> None:
    lines = printed(noted())
    assert ["rollout", "9.0", "45.0%"] in lines
    assert ["validation", "3.0", "15.0%"] in lines
    assert ["other", "2.0", "10.0%"] in lines
    assert ["total", "20.0"] in lines
    assert not any("before" in line for line in lines)


def test_the_table_says_so_where_before_is_not_the_start() -> None:
    only = {"val/sums/avg@1": 0.5}
    lines = printed(noted((2, only), (8, only)))
    assert ["before:", "iteration", "2,", "after:", "iteration", "8", "of", "10"] in lines
    assert ["sums", "0.500", "0.500", "+0.000"] in lines
    assert not any(line[:1] == ["all"] for line in lines)
    assert ["sums", "–", "0.500", "–"] in printed(noted((10, only)))
    assert ["sums", "0.500", "–", "–"] in printed(noted((0, only)))
