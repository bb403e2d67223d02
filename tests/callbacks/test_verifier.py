import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from toy_pipeline import Recites, Scored, Toy, fit, loader, rollouts_of, trainer_of

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts
from sppo_lightning.callbacks.exact_match import ExactMatch
from sppo_lightning.callbacks.verifier import Verifier, VerifierFailure
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import Stage


def scores_of(batch: PromptBatch, name: str = "scored") -> list[float]:
    assert batch.rollouts is not None
    return batch.rollouts.scores[name].values.tolist()


def test_a_subclass_of_one_method_scores_and_logs():
    class CountsVowels(Verifier):
        def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
            return [sum(c in "aeiou" for c in r) / len(r) if r != "?" else None for r in responses]

    module, trainer = fit(CountsVowels(weight=2.0), batches=[["aeio", "abab", "xyz", "?"]])
    (batch,) = module.seen
    assert batch.rollouts is not None
    scores = batch.rollouts.scores["counts_vowels"]
    assert scores.values[:3].tolist() == [1.0, 0.5, 0.0]
    assert math.isnan(scores.values[3])
    assert (scores.values.dtype, scores.weight, scores.role, scores.baseline) == (
        torch.float32,
        2.0,
        "outcome",
        0.0,
    )
    assert batch.rollouts.rewards[:3].tolist() == [1.0, 0.5, 0.0]
    logged = trainer.logged_metrics
    assert logged["reward/counts_vowels"] == 0.5
    assert logged["verifier/counts_vowels/no_verdict"] == 1
    assert logged["verifier/counts_vowels/errors"] == 0
    assert logged["verifier/counts_vowels/timeouts"] == 0
    assert 0 < logged["verifier/counts_vowels/seconds"] < 1
    assert module.phase_seconds["verify"] > 0


def test_names_are_the_class_in_snake_case():
    class HTTPJudge(Scored):
        pass

    assert HTTPJudge().name == "http_judge"
    assert ExactMatch().name == "exact_match"
    assert ExactMatch(name="strict").name == "strict"


def test_only_an_outcome_provides_scores():
    assert Scored().provides == {"scores"}
    assert Scored(role="shaping").provides == frozenset()
    assert Scored().requires == {"rollouts"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"role": "penalty"}, "role"),
        ({"weight": 0.0}, "weight"),
        ({"weight": math.nan, "role": "shaping"}, "weight"),
        ({"max_failure_rate": 1.5}, "max_failure_rate"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        Scored(**settings)


def test_two_verifiers_of_one_name_are_refused_at_setup():
    with pytest.raises(InputError, match="two verifiers named 'scored'"):
        fit(Scored(), Scored(), batches=[["1"]])


def test_a_verifier_needs_rollouts_before_it():
    with pytest.raises(InputError, match="RolloutGeneration"):
        trainer_of(Scored()).fit(Toy(), loader(["1"]))


def test_only_rows_that_fail_lose_their_verdict():
    def one(response: str) -> float:
        if response == "slow":
            raise TimeoutError
        return float(response)

    module, trainer = fit(Scored(one, max_failure_rate=0.5), batches=[["1", "bad", "0", "slow"]])
    values = scores_of(module.seen[0])
    assert [values[0], values[2]] == [1.0, 0.0]
    assert math.isnan(values[1])
    assert math.isnan(values[3])
    logged = trainer.logged_metrics
    assert [logged[f"verifier/scored/{kind}"] for kind in ("errors", "timeouts", "no_verdict")] == [1, 1, 2]
    assert logged["reward/scored"] == 0.5


def test_too_many_failures_stop_the_run_with_the_first_traceback():
    with pytest.raises(VerifierFailure) as raised:
        fit(Scored(max_failure_rate=0.4), batches=[["1", "first bad", "second bad", "0"]])
    text = str(raised.value)
    assert "'scored' failed on 2 of 4 responses (50.0%), more than `max_failure_rate`=0.4" in text
    assert "could not convert string to float: 'first bad'" in text
    assert "second bad" not in text


def test_further_calls_for_a_batch_add_to_its_counts_and_to_nothing_else():
    class Again(Stage):
        """Scores one more response, which the batch does not hold."""

        def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
            more = PromptBatch([], [], [])
            more.rollouts = rollouts_of(["bad"])
            verifier.run(more, trainer, module)

    class Logged(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            names = ("verifier/scored/errors", "verifier/scored/no_verdict", "reward/scored")
            logged.append([float(trainer.callback_metrics[name]) for name in names])

    logged: list[list[float]] = []
    # one failure in four responses is 25 %, though it is the only response of its call
    verifier = Scored(max_failure_rate=0.25, role="shaping")
    fit(verifier, Again(), Logged(), batches=[["1", "2", "6"], ["7", "7", "7"]])
    assert logged == [[1.0, 1.0, 3.0], [1.0, 1.0, 7.0]]
    assert verifier.state_dict() == {"total": 30.0, "number": 6.0}
    verifier = Scored(max_failure_rate=0.24)
    with pytest.raises(VerifierFailure, match=r"failed on 1 of 4 responses \(25.0%\)"):
        fit(verifier, Again(), batches=[["1", "1", "1"]])


def test_a_score_may_read_the_whole_rollouts_and_still_loses_only_rows_that_fail():
    class Room(Verifier):
        def score_rollouts(self, rollouts: Rollouts) -> list[float | None]:
            if "bad" in rollouts.responses:
                raise RuntimeError("bad")
            return [1 - tokens / 4 for tokens in rollouts.response_mask.sum(1).tolist()]

    module, trainer = fit(Room(max_failure_rate=0.5), batches=[["1", "bad"]])
    values = scores_of(module.seen[0], "room")
    assert values[0] == 0.25  # 3 tokens
    assert math.isnan(values[1])
    assert trainer.logged_metrics["verifier/room/errors"] == 1


def test_failures_that_the_verifier_reports_count_too():
    class Reports(Verifier):
        def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
            self.counts["errors"] += 1
            return [None for _ in responses]

    with pytest.raises(VerifierFailure, match="failed on 1 of 2 responses"):
        fit(Reports(), batches=[["a", "b"]])


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf, "1", [1.0]])
def test_outcomes_outside_the_unit_interval_name_the_row(value: Any):
    with pytest.raises(InputError) as raised:
        fit(Scored(lambda response: value if response == "b" else 0.0), batches=[["a", "b"]])
    assert all(
        part in str(raised.value) for part in ("'scored'", repr(value), "row 1 of 'sums'", "[0, 1]", "`None`")
    )


def test_shaping_takes_any_finite_number():
    module, _ = fit(Scored(role="shaping"), batches=[["-7.5", "3"]])
    assert scores_of(module.seen[0]) == [-7.5, 3.0]
    with pytest.raises(InputError, match="finite"):
        fit(Scored(role="shaping"), batches=[["nan"]])


def test_booleans_are_scores():
    module, _ = fit(Scored(lambda response: response == "5"), batches=[["5", "6"]])
    assert scores_of(module.seen[0]) == [1.0, 0.0]


def test_one_score_for_each_response():
    class Short(Verifier):
        def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
            return [1.0]

    with pytest.raises(InputError, match="returned 1 scores for 3 responses"):
        fit(Short(), batches=[["a", "b", "c"]])


def test_the_running_mean_of_a_shaping_score_is_the_one_before_the_batch(tmp_path: Path):
    verifier = Scored(role="shaping", name="length")
    batches = [["1", "3"], [], ["10"], ["0"]]
    module, trainer = fit(verifier, batches=batches)
    rollouts = [batch.rollouts for batch in module.seen]
    assert [r.scores["length"].baseline for r in rollouts if r is not None] == [
        0.0,
        2.0,
        2.0,
        pytest.approx(14 / 3),
    ]
    assert rollouts[2] is not None
    assert rollouts[2].shaping.tolist() == [8.0]

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Scored(role="shaping", name="length")
    again = Toy()
    trainer = trainer_of(Recites(), resumed, max_epochs=2)
    trainer.fit(again, loader(["100"]), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    (batch,) = again.seen
    assert batch.rollouts is not None
    assert batch.rollouts.scores["length"].baseline == pytest.approx(14 / 4)


class WritesBaselines(Toy):
    """Writes what its rank saw to a file, since a forked rank takes everything else with it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        seen = [batch.rollouts.scores["scored"].baseline for batch in self.seen if batch.rollouts is not None]
        logged = self.trainer.logged_metrics["reward/scored"].item()
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps([seen, logged]))


def test_ranks_share_the_running_mean(tmp_path: Path):
    batches = [["1"], [], ["4", "6", "5"], ["8"]]  # rank 0 has the first and third, rank 1 the others
    fit(
        Scored(role="shaping"),
        batches=batches,
        module=WritesBaselines(tmp_path),
        strategy="ddp_fork",
        devices=2,
    )
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    # the first two batches have the mean 1; the last two, logged, 23/4
    assert found == [[[0.0, 1.0], 5.75], [[0.0, 1.0], 5.75]]


def test_validation_scores_but_moves_no_mean():
    verifier = Scored(role="shaping", max_failure_rate=0.5)
    module = Toy()
    trainer = trainer_of(Recites(), verifier)
    trainer.validate(module, loader(["1", "bad"], ["bad", "4"]), verbose=False)
    assert trainer.logged_metrics["verifier/scored/errors"] == 2
    assert "reward/scored" not in trainer.logged_metrics
    assert verifier.state_dict() == {"total": 0.0, "number": 0.0}


def test_predict_scores_greedy_responses_too():
    class Greedy(Recites):
        def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
            super().process(batch, trainer, module)
            batch.greedy_rollouts = rollouts_of(["1"])

    module = Toy()
    trainer_of(Greedy(), Scored()).predict(module, loader(["0", "0.5"]), return_predictions=False)
    (batch,) = module.seen
    assert scores_of(batch) == [0.0, 0.5]
    assert batch.greedy_rollouts is not None
    assert batch.greedy_rollouts.scores["scored"].values.tolist() == [1.0]
