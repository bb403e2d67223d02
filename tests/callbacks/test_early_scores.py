"""Scoring begins while other responses are still sampled, and comes to the same."""

import threading
import time
from typing import Any

import pytest
from lightning.pytorch import Callback
from tiny import make_chain_sppo, make_trainer
from toy_pipeline import rollouts_of

from sppo_lightning.batch import Prompt, Rollouts
from sppo_lightning.callbacks import MathVerifier, RolloutGeneration, Verifier
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import HFEngine, Sampling


class Early(Verifier):
    """Scores a response by its number; keeps what it was asked, and by which thread."""

    scores_early = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.asked: list[list[str]] = []
        self.threads: set[str] = set()
        self.is_broken = False

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        self.asked.append(responses)
        self.threads.add(threading.current_thread().name)
        if self.is_broken and len(responses) > 1:
            raise ValueError("too many at once")
        if "bad" in responses:
            raise ValueError("cannot read this")
        self.counts["timeouts"] += responses.count("0.5")
        return [float(response) for response in responses]


def test_what_was_asked_for_early_is_not_asked_again():
    verifier = Early(truncated="unanswered")
    rollouts = rollouts_of(["0", "0.25", "0.5", "1", "0.75"])
    rollouts.finish_reasons[1] = "length"
    verifier.score_early(rollouts.rows([0, 1, 2]))
    verifier.score_early(rollouts.rows([4]))
    scores = verifier._scores(rollouts)
    assert scores.values.tolist() == [0.0, 0.0, 0.5, 1.0, 0.75]
    assert verifier.asked == [["0", "0.5"], ["0.75"], ["1"]]
    assert verifier.threads == {"scores-early_0"}
    assert verifier.counts["timeouts"] == 1
    assert verifier._scores(rollouts).values.tolist() == [0.0, 0.0, 0.5, 1.0, 0.75]  # once more, from the start
    assert verifier.asked[3:] == [["0", "0.5", "1", "0.75"]]
    verifier._early.close()  # type: ignore[union-attr]


def test_a_failure_is_counted_once_and_costs_no_other_response():
    verifier = Early(max_failure_rate=0.5)
    rollouts = rollouts_of(["0", "bad", "0.5", "1"])
    verifier.score_early(rollouts.rows([0, 1]))
    verifier.score_early(rollouts.rows([2]))
    values = verifier._scores(rollouts).values
    assert values[[0, 2, 3]].tolist() == [0.0, 0.5, 1.0]
    assert values[1].isnan()
    assert (verifier.counts["errors"], verifier.counts["no_verdict"]) == (1, 1)
    verifier._early.close()  # type: ignore[union-attr]


def test_a_verifier_that_waits_for_others_verdicts_does_not_begin():
    verifier = Early(only_if_correct=True)
    verifier.score_early(rollouts_of(["1"]))
    assert verifier.asked == []


class Announces(HFEngine):
    """Waits in the middle of its responses until the verifier has been asked."""

    def __init__(self, verifier: Early, wait: bool) -> None:
        super().__init__()
        self.verifier, self.wait = verifier, wait
        self.asked_meanwhile = 0

    def stream(self, batch: Any, sampling: Sampling) -> Any:
        for number, response in enumerate(super().stream(batch, sampling)):
            yield response
            if number == 20:
                while self.wait and not self.verifier.asked:
                    time.sleep(0.01)
                self.asked_meanwhile = sum(map(len, self.verifier.asked))


class Lengths(Early):
    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return super().score(prompts, [str(min(len(response), 50) / 50) for response in responses])


class KeepsRollouts(Callback):
    def __init__(self) -> None:
        self.seen: list[Rollouts] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.seen.append(batch.rollouts)


@pytest.mark.parametrize("early", [True, False])
def test_in_a_run(early: bool):
    verifier = Lengths()
    verifier._early = verifier._early if early else None
    engine = Announces(verifier, wait=early)
    data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=8), batch_size=8)
    generation = RolloutGeneration(Sampling(max_new_tokens=8, samples_per_prompt=4), engine=engine)
    keeps = KeepsRollouts()
    make_trainer(generation, verifier, keeps).fit(make_chain_sppo(1e-2), data)
    [rollouts] = keeps.seen
    expected = [min(len(response), 50) / 50 for response in rollouts.responses]
    assert rollouts.scores["lengths"].values.tolist() == pytest.approx(expected)
    assert engine.asked_meanwhile == (16 if early else 0)


def test_math_answers_are_the_same():
    responses = [r"\boxed{5}", r"\boxed{\frac{10}{2}}", r"\boxed{x+5-x}", r"\boxed{6}", "none"]
    verifier = MathVerifier()
    rollouts = rollouts_of(responses)
    verifier.score_early(rollouts.rows([0, 1, 2]))
    assert verifier._scores(rollouts).values.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    verifier.teardown(None, None, "fit")  # type: ignore[arg-type]
