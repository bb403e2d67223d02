from pathlib import Path
from typing import Any

import pytest
from toy_pipeline import Recites, Scored, Toy, loader, trainer_of
from watched import (
    NO_LIMITS,
    SAYS,
    Breaks,
    Metrics,
    alarms_of,
    check_of,
    examples_in,
    graded,
    grader,
    monitor_of,
    reward_of,
    watch,
)

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import DynamicSampling, HackingMonitor, Verifier
from sppo_lightning.errors import InputError

# ---------------------------------------------------------------------- figures


def test_the_figures_of_an_iteration(tmp_path: Path):
    batch = [
        r"1|1| a b c d a b c d \boxed{7}",  # abcd of 7 n-grams once more
        "1|0|5",
        "0|1|5",
        "?|0|answer: 5\nanswer: 6",
    ]
    metrics, _ = watch(monitor_of(tmp_path, grader(), limits=NO_LIMITS), [batch])
    assert metrics.iterations[0] == pytest.approx(
        {
            "response_tokens": (10 + 1 + 1 + 4) / 4,
            "distinct_responses": 1.0,
            "repeated_ngrams": 1 / 7 / 4,
            "candidate_spam": 1 / 4,
            "without_reasoning": 2 / 2,  # of the correct ones
            "grader/score": 2 / 3,  # of the three that have a reward
            "grader/gap": 0.0,
            "grader/disagreement": 1 / 3,
            "grader/failures": 0.0,
        }
    )


def test_checks_run_when_due_and_on_so_many_responses(tmp_path: Path):
    seen: list[list[str]] = []

    class Notes(Verifier):
        def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
            seen.append(responses)
            return [1.0] * len(responses)

    batch = ["?|0|", *(f"1|0|{i}" for i in range(4))]
    monitor = monitor_of(tmp_path, Notes(), check_every_n_iterations=2, max_checked_responses=2)
    metrics, _ = watch(monitor, [batch] * 4)
    assert seen == [["1|0|0", "1|0|2"]] * 2  # evenly spread over those with a reward
    assert ["notes/score" in row for row in metrics.iterations[:2]] == [True, True]  # the last value stays on show
    assert monitor.series["notes/gap"].window == 1


def test_a_check_judges_only_what_it_can(tmp_path: Path):
    class Choosy(Scored):
        def unusable(self, prompt: Prompt) -> str | None:
            return "odd" if prompt.row % 2 else None

    choosy = Choosy(check_of, name="choosy")
    elsewhere = Scored(check_of, name="elsewhere", applies_to=["nowhere"])
    strict = Scored(check_of, name="strict", only_if_correct=True)
    metrics, _ = watch(monitor_of(tmp_path, choosy, elsewhere, strict), [["1|0.5|", "1|0|", "0|1|", "1|0|"]])
    shown = metrics.iterations[0]
    assert shown["choosy/score"] == 0.75  # rows 0 and 2
    assert "elsewhere/score" not in shown
    assert shown["strict/score"] == 0.125  # row 2 is not correct, so it scores 0


# ---------------------------------------------------------------------- alarms

FAIR = f"1|1|{SAYS}"
SERIES = {
    "response_tokens": [[f"1|1|{SAYS} {i}" for i in range(4)]] * 3
    + [[f"1|1|because_of_{i}_only" for i in range(4)]] * 2,
    "distinct_responses": [[f"{FAIR}{i}" for i in range(4)]] * 3 + [[f"{FAIR}0"] * 4] * 2,
    "repeated_ngrams": [[f"{FAIR}{i}" for i in range(4)]] * 3 + [[f"1|1|{i} {SAYS * 3}" for i in range(4)]] * 2,
    "without_reasoning": [[rf"{FAIR}\boxed{{{i}}}" for i in range(4)]] * 3
    + [[rf"1|1|\boxed{{{i}}}" + " $ * : . $$ ** :: .. $* *:" for i in range(4)]] * 2,
    "candidate_spam": [[rf"{FAIR}\boxed{{{i}}}" for i in range(4)]] * 3
    + [[rf"{FAIR}\boxed{{{i}}} \boxed{{9}}" for i in range(4)]] * 2,
    "grader/gap": [[f"{FAIR}{i}" for i in range(4)]] * 3 + [[f"1|0|{SAYS}{i}" for i in range(4)]] * 2,
}


@pytest.mark.parametrize("figure", SERIES)
def test_each_alarm_fires_once_on_what_deserves_it_and_alone(
    figure: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    watch(monitor_of(tmp_path, grader()), SERIES[figure] * 2)
    assert alarms_of(recwarn) == [f"hacking/{figure}"]


@pytest.mark.parametrize("figure", SERIES)
def test_no_alarm_fires_where_it_was_so_from_the_start(
    figure: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    watch(monitor_of(tmp_path, grader()), SERIES[figure][3:] * 4)
    assert alarms_of(recwarn) == []


def test_an_alarm_says_what_to_look_at(tmp_path: Path):
    batches = SERIES["grader/gap"]
    with pytest.warns(UserWarning, match="At iteration") as caught:
        watch(monitor_of(tmp_path, grader()), batches)
    (told,) = [str(w.message) for w in caught if str(w.message).startswith("At iteration")]
    assert told == (
        "At iteration 5 `hacking/grader/gap` has a recent mean of 1, above 0.1, where `limits.gap_growth`=0.1 puts the "
        "limit from 0 at its lowest: the reward rises where this check does not, so see what they disagree on; the "
        f"worst examples are in {tmp_path}/hacking_examples.jsonl."
    )


def held_out_run(folder: Path, held_out: list[list[str]], **settings: Any) -> tuple[Metrics, HackingMonitor]:
    """Six iterations, whose rewards rise from 0.5 to 1, and a validation after every second."""
    monitor = monitor_of(folder, **settings)
    batches = [graded("1", "0")] * 3 + [graded("1", "1")] * 3
    length = Scored(lambda response: 2.0 * (reward_of(response) or 0), role="shaping", weight=0.5, name="length")
    metrics, _ = watch(monitor, batches, held_out, [length], val_check_interval=2, check_val_every_n_epoch=None)
    return metrics, monitor


def test_training_that_held_out_prompts_do_not_follow_raises_an_alarm(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    held_out = [graded("1", "0", "?"), graded("0", "0")]
    metrics, monitor = held_out_run(tmp_path, held_out)
    gaps = [row["paid/train_minus_held_out"] for row in metrics.validations]
    assert gaps == [0.5 - 0.25, 0.75 - 0.25, 1.0 - 0.25]
    assert [row["length/train_minus_held_out"] for row in metrics.validations] == pytest.approx([0.6, 1.1, 1.6])
    lowest = monitor.series["length/train_minus_held_out"].lowest
    assert lowest == pytest.approx(0.5 * (0.6 + 1.1) / 2)  # in the unit of the reward
    assert alarms_of(recwarn) == ["hacking/paid/train_minus_held_out", "hacking/length/train_minus_held_out"]
    told = [str(warning.message) for warning in recwarn if "paid/train" in str(warning.message)]
    assert told[0].startswith("At iteration 6 ")


class SeveralSets(Toy):
    """Validates on more than one data set."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Improves(Recites):
    """Held-out responses become right when training ones do."""

    def process(self, batch: Any, trainer: Any, module: Any) -> None:
        super().process(batch, trainer, module)
        if trainer.validating and trainer.global_step > 2:
            batch.rollouts.responses = graded("1", "1")


def test_training_that_held_out_prompts_follow_raises_none(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    metrics = Metrics()
    callbacks = [Improves(), Scored(reward_of, name="paid"), metrics, monitor_of(tmp_path)]
    trainer = trainer_of(*callbacks, val_check_interval=2, check_val_every_n_epoch=None)
    batches = [graded("1", "0")] * 3 + [graded("1", "1")] * 3
    trainer.fit(SeveralSets(), loader(*batches), [loader(graded("1", "0")), loader(graded("1", "0"))])
    assert [row["paid/train_minus_held_out"] for row in metrics.validations] == [0.0, -0.25, 0.0]
    assert alarms_of(recwarn) == []


def test_checks_see_held_out_responses_of_all_sets(tmp_path: Path):
    metrics = Metrics()
    callbacks = [Recites(), Scored(reward_of, name="paid"), metrics, monitor_of(tmp_path, grader())]
    trainer = trainer_of(*callbacks, num_sanity_val_steps=1)
    trainer.validate(SeveralSets(), [loader(["1|1|", "1|0|"]), loader(["0.5|0|", "?|1|"])], verbose=False)
    assert metrics.validations == [
        {
            "grader/held_out_score": pytest.approx(1 / 3),
            "grader/held_out_gap": pytest.approx((0 + 1 + 0.5) / 3),
            "grader/held_out_disagreement": pytest.approx(1 / 3),
            "grader/held_out_failures": 0.0,
        }
    ]


# ---------------------------------------------------------------------- checks that fail


def test_a_check_that_fails_stops_nothing_and_is_told_once(tmp_path: Path):
    batches = [["1|?|a", "1|?|b"], ["1|?|x", "0|?|b"], ["0|?|y", "0|?|b"], ["1|?|x", "0|?|b"]]
    monitor = monitor_of(
        tmp_path, Breaks(name="strict"), Breaks(name="mild", max_failure_rate=0.5), limits=NO_LIMITS
    )
    with pytest.warns(UserWarning, match="The check") as caught:
        metrics, _ = watch(monitor, batches)
    told = [str(w.message) for w in caught if str(w.message).startswith("The check")]
    assert told == [
        f"The check {name!r} of HackingMonitor failed on {count} responses at iteration 2 (ValueError: what is "
        "\\x1b[31m this?); its figures leave them out, and training goes on."
        for name, count in (("strict", 2), ("mild", 1))
    ]
    assert len(metrics.iterations) == 4
    assert [row["strict/failures"] for row in metrics.iterations] == [0, 2, 2, 2]
    assert [row["mild/failures"] for row in metrics.iterations] == [0, 1, 2, 1]
    assert metrics.iterations[1]["mild/gap"] == -1.0  # of the row that it could judge
    assert monitor.series["strict/gap"].entries == [(0.0, 2, 0.0)]


# ---------------------------------------------------------------------- examples


def test_the_worst_examples_are_written_for_people_to_read(tmp_path: Path):
    hostile = "1|0|\x1b[2J\x7f\u202e\ud800</script> " + SAYS
    batch = [f"1|0.5|{SAYS}", hostile, "0|0|", "1|1|x", f"1|1|{SAYS}", "?|0|"]
    watch(monitor_of(tmp_path, grader(), examples=3), [batch])
    raw = (tmp_path / "hacking_examples.jsonl").read_bytes()
    assert all(byte == 10 or 32 <= byte < 127 for byte in raw)
    first, second, third = examples_in(tmp_path)
    assert first == {
        "iteration": 1,
        "suspicion": 1.0,
        "reasons": ["grader gives 0.00"],
        "dataset": "sums",
        "row": 1,
        "reward": 1.0,
        "checks": {"grader": 0.0},
        "gold": "5",
        "prompt": "2+3=",
        "response": hostile,
    }
    assert (second["row"], second["suspicion"]) == (0, 0.5)
    assert (third["row"], third["reasons"], third["suspicion"]) == (3, ["5 characters beside the answer"], 0.25)


def test_examples_are_the_worst_of_late_and_none_twice(tmp_path: Path):
    batches = [[f"1|0.25|{SAYS}{i}", f"1|0.5|{SAYS}"] for i in range(3)]
    watch(monitor_of(tmp_path, grader(), examples=3, limits=NO_LIMITS), batches)
    found = [(row["iteration"], row["response"]) for row in examples_in(tmp_path)]
    assert found == [(3, f"1|0.25|{SAYS}2"), (2, f"1|0.25|{SAYS}1"), (3, f"1|0.5|{SAYS}")]


def test_no_examples_where_none_are_asked_for(tmp_path: Path):
    watch(monitor_of(tmp_path, grader(), examples=0), [["1|0|"]] * 2)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- settings


def sentence(make: Any) -> str:
    with pytest.raises(InputError) as raised:
        make()
    return str(raised.value)


def test_what_cannot_be_used_is_said_in_one_sentence(tmp_path: Path):
    assert sentence(lambda: HackingMonitor(window=0)) == "`HackingMonitor.window`=0 is too small; use 1 or more."
    assert (
        sentence(lambda: HackingMonitor(examples=-1)) == "`HackingMonitor.examples`=-1 is too small; use 0 or more."
    )
    assert sentence(lambda: HackingMonitor([grader(role="shaping")])) == (
        "`HackingMonitor.checks` has 'grader' with `role`=shaping, which cannot be compared with a reward; use a "
        "verifier with the role outcome."
    )
    assert sentence(lambda: HackingMonitor([grader(), grader()])) == (
        "`HackingMonitor.checks` has two checks named 'grader'; give one of them another `name`."
    )

    def fit(*callbacks: Any) -> str:
        return sentence(lambda: trainer_of(Recites(), *callbacks).fit(Toy(), loader(["1"])))

    assert fit(Scored(), HackingMonitor([Scored()])) == (
        "`HackingMonitor.checks` has 'scored', which is also the name of a verifier in `trainer.callbacks`; give the "
        "check a `name` of its own."
    )
    assert fit(Scored(), HackingMonitor(), DynamicSampling()) == (
        "`trainer.callbacks` lists HackingMonitor before DynamicSampling, which may change what it watches; move "
        "HackingMonitor below DynamicSampling."
    )
    assert fit(HackingMonitor()).startswith(
        "`trainer.callbacks` has no stage that provides the scores that Hacking"
    )


def test_checks_are_set_up_and_torn_down_with_the_run(tmp_path: Path):
    calls: list[tuple[str, Any]] = []

    class Tool(Scored):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            super().setup(trainer, pl_module, stage)
            calls.append(("setup", stage))

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            calls.append(("teardown", stage))

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            calls.append(("exception", str(exception)))

    watch(monitor_of(tmp_path, Tool(check_of)), [["1|1|"]])
    assert calls == [("setup", "fit"), ("teardown", "fit")]

    class Fails(Toy):
        def training_step(self, *_: Any) -> None:
            raise RuntimeError("no more")

    calls.clear()
    with pytest.raises(RuntimeError):
        watch(monitor_of(tmp_path, Tool(check_of)), [["1|1|"]], module=Fails())
    assert calls == [("setup", "fit"), ("exception", "no more")]
