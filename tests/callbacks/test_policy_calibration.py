import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain_run import check_same
from chain_run import run as chain_run
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import FirstWord, Recorder, data, sppo, stages, trainer_of

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.callbacks import InitialValidation, PolicyCalibration, RolloutGeneration, Verifier
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.verification.extraction import extract_answer

PNG = b"\x89PNG"
WORDS = "a b ####a ####b"  # a response that has one of the last two has an answer


class Answers(Verifier):
    """Right where the final answer is the gold one; no verdict on the prompts of row 3."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [
            None if p.row == 3 else float(extract_answer(r) == p.gold)
            for p, r in zip(prompts, responses, strict=True)
        ]


class Seen(Callback):
    """What each validation has sampled: data set, row, probabilities and words of the tokens, and the reward."""

    def __init__(self) -> None:
        self.validations: list[list[tuple[str, int, list[float], list[str], float]]] = []

    def on_validation_start(self, *_: Any) -> None:
        self.validations.append([])

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, *_: Any
    ) -> None:
        rollouts = batch.rollouts
        assert rollouts is not None
        for i, prompt in enumerate(rollouts.prompts):
            n = int(rollouts.response_mask[i].sum())
            words = pl_module.policy.tokenizer.convert_ids_to_tokens(rollouts.response_ids[i, :n].tolist())  # type: ignore[union-attr, operator]
            row = (prompt.dataset, prompt.row, rollouts.sampled_log_probs[i, :n].exp().tolist(), words)
            self.validations[-1].append((*row, float(rollouts.rewards[i])))


def pairs_of(seen: list[tuple[str, int, list[float], list[str], float]], name: str) -> dict[str, Any]:
    """Both confidences with their outcomes, from the sampled words: an answer goes from `####` to the last word."""
    problems: dict[tuple[str, int], list[tuple[str | None, float]]] = {}
    tokens = []
    for dataset, row, chances, words, reward in seen:
        if name not in ("all", dataset) or math.isnan(reward):
            continue
        said = [i for i, word in enumerate(words) if word[0] != "<"]
        marks = [i for i in said if words[i].startswith("####")]
        answer = None
        if marks:
            place = [i for i in said if i >= marks[-1]]
            answer = " ".join(words[i] for i in place)
            tokens.append((np.mean(chances[place[0] : place[-1] + 1]), reward))
        problems.setdefault((dataset, row), []).append((answer, reward))
    agreement = []
    for given in problems.values():
        answers = [answer for answer, _ in given]
        votes = [answer for answer in answers if answer is not None]
        if votes:
            winner = max(votes, key=votes.count)
            agreement.append((votes.count(winner) / len(given), np.mean([r for a, r in given if a == winner])))
        else:
            agreement.append((0.0, 0.0))
    return {"agreement": np.array(agreement), "token_probability": np.array(tokens)}


def naive(pairs: np.ndarray, bins: int) -> dict[str, float]:
    """The metrics by their definitions, without ties in mind but for AUROC."""
    values, outcomes = pairs.T
    edges = np.minimum(np.floor(values * bins), bins - 1)
    error = sum(
        abs(values[edges == b].mean() - outcomes[edges == b].mean()) * (edges == b).mean() for b in np.unique(edges)
    )
    found = {"accuracy": outcomes.mean(), "mean": values.mean(), "calibration_error": error}
    right, wrong = values[outcomes >= 0.5], values[outcomes < 0.5]
    if len(right) and len(wrong):
        found["auroc"] = np.mean([(r > w) + (r == w) / 2 for r in right for w in wrong])
    if len(set(values)) == len(values):
        failures = 1 - outcomes[np.argsort(-values)]
        found["aurc"] = np.mean(np.cumsum(failures) / np.arange(1, len(failures) + 1))
    return found


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "policy_calibration.json").read_text())


def check_numbers(row: dict[str, Any], logged: dict[str, float], seen: Any, bins: int) -> None:
    """What the file says of a validation, and what was logged, is what its samples say."""
    assert list(row["data_sets"]) == ["all", "easy", "hard"]
    for name, kinds in row["data_sets"].items():
        expected = pairs_of(seen, name)
        assert list(kinds) == ["agreement", "token_probability"]
        for kind, numbers in kinds.items():
            assert numbers["count"] == len(expected[kind])
            metrics = naive(expected[kind], bins)
            assert numbers == pytest.approx(numbers | metrics, abs=2e-6)
            assert {f"val/{name}/{kind}_{metric}" for metric in metrics} <= set(logged)
            for metric, value in numbers.items():
                if metric != "count":
                    assert logged[f"val/{name}/{kind}_{metric}"] == pytest.approx(value, abs=2e-6)


def test_a_validations_numbers_are_those_of_its_samples(tmp_path: Path) -> None:
    seen, recorder = Seen(), Recorder()
    chain = [*stages(Answers()), PolicyCalibration(str(tmp_path / "picture"), bins=4), seen, recorder]
    module = sppo(tmp_path, words=WORDS)
    trainer_of(chain).validate(module, datamodule=data(), verbose=False)
    found = read(tmp_path / "picture")
    (row,) = found["validations"]
    assert (found["tokens"], row["iteration"]) == ("answer", None)
    check_numbers(row, recorder.validations[0], seen.validations[0], 4)
    assert row["data_sets"]["all"]["agreement"]["count"] == 14  # of 16, two being without a verdict
    assert 5 < row["data_sets"]["all"]["token_probability"]["count"] < 28
    shares = pairs_of(seen.validations[0], "all")["agreement"][:, 0].tolist()
    bins = {b["value_mean"]: b["count"] for b in found["bins"]["now"]["agreement"]}
    assert bins == {share: shares.count(share) for share in (0.0, 0.5, 1.0)}
    assert (tmp_path / "picture" / "policy_calibration.png").read_bytes().startswith(PNG)
    assert module.evaluation.confidence is None  # whoever validates next asks for what it wants


def fit(folder: Path, *callbacks: Callback, **settings: Any) -> tuple[dict[str, Any], Seen, Recorder]:
    """Four iterations of two updates each, with a validation before the first and behind every second."""
    seen, recorder = Seen(), Recorder()
    chain = [*stages(Answers()), InitialValidation(), PolicyCalibration(str(folder)), seen, recorder]
    trainer = trainer_of([*chain, *callbacks], **({"val_check_interval": 2} | settings))
    trainer.fit(sppo(folder, words=WORDS), datamodule=data())
    return read(folder), seen, recorder


def test_before_during_and_after_training(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    found, seen, recorder = fit(tmp_path / "picture", logger=logger)
    assert [row["iteration"] for row in found["validations"]] == [0, 2, 4]
    for row, logged, sampled in zip(found["validations"], recorder.validations, seen.validations, strict=True):
        check_numbers(row, logged, sampled, 10)
    before = pairs_of(seen.validations[0], "all")["token_probability"]
    assert sum(b["count"] for b in found["bins"]["before"]["token_probability"]) == len(before)
    mean = sum(b["count"] * b["value_mean"] for b in found["bins"]["before"]["token_probability"]) / len(before)
    assert mean == pytest.approx(before[:, 0].mean(), abs=2e-6)
    confidences = [row["data_sets"]["all"]["token_probability"]["mean"] for row in found["validations"]]
    assert confidences[0] < confidences[-1]  # it has learned to be sure
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    steps = [event.step for event in events.Scalars("val/all/agreement_aurc")]
    assert [image.step for image in events.Images("policy/calibration")] == steps == [0, 1, 3]


def resumed(folder: Path, saved: Path, **settings: Any) -> dict[str, Any]:
    chain = [*stages(Answers()), InitialValidation(), PolicyCalibration(str(folder), **settings)]
    trainer = trainer_of(chain, val_check_interval=2, max_steps=8)
    trainer.fit(sppo(folder, words=WORDS), datamodule=data(), ckpt_path=str(saved))
    return read(folder)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_history(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path / "whole")
    saver = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=1, save_top_k=1, save_last=True)
    half, _, _ = fit(tmp_path / "half", saver, max_steps=6, enable_checkpointing=True)
    assert [row["iteration"] for row in half["validations"]] == [0, 2]
    assert resumed(tmp_path / "again", tmp_path / "last.ckpt") == whole
    with pytest.warns(
        UserWarning, match="`PolicyCalibration.tokens`=response cannot be compared with the checkpoi"
    ):
        other = resumed(tmp_path / "other", tmp_path / "last.ckpt", tokens="response")
    assert [row["iteration"] for row in other["validations"]] == [4]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if text.startswith("PolicyCalibration")]


def test_one_response_per_problem_has_no_agreement(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    chain = [RolloutGeneration(Sampling(max_new_tokens=2)), Answers(), PolicyCalibration(str(tmp_path / "p"))]
    with caplog.at_level("INFO"):
        trainer_of([*chain, recorder], val_check_interval=2, max_steps=8).fit(
            sppo(tmp_path, words=WORDS), datamodule=data()
        )
    (sentence,) = said(caplog)  # once, though there are two validations
    assert sentence.startswith(
        "PolicyCalibration draws no agreement: no problem of the validation has two responses"
    )
    assert "`validation.samples_per_prompt`" in sentence
    kinds = [set(kinds) for row in read(tmp_path / "p")["validations"] for kinds in row["data_sets"].values()]
    assert kinds == [{"token_probability"}] * 6
    assert not [name for name in recorder.validations[-1] if "agreement" in name]
    assert (tmp_path / "p" / "policy_calibration.png").exists()


def test_responses_without_answers_have_the_probability_of_all_tokens_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = {}
    for tokens in ("answer", "response"):
        seen, path = Seen(), tmp_path / tokens
        chain = [*stages(FirstWord()), PolicyCalibration(str(path), tokens), seen]  # type: ignore[arg-type]
        with caplog.at_level("INFO"):
            trainer_of(chain).validate(sppo(tmp_path), datamodule=data(), verbose=False)
        found[tokens] = read(path)["validations"][0]["data_sets"]["all"]
        assert (path / "policy_calibration.png").exists() is (tokens == "response")
    assert [sentence.split(":")[0] for sentence in said(caplog)] == [
        "PolicyCalibration draws no agreement",
        "PolicyCalibration draws no token probability",
        "PolicyCalibration draws no agreement",
    ]
    assert found["answer"] == {}
    chances = [np.mean(chances) for _, _, chances, _, _ in seen.validations[0]]
    assert found["response"]["token_probability"]["mean"] == pytest.approx(np.mean(chances), abs=2e-6)
    assert found["response"]["token_probability"]["count"] == 32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    runs = [
        chain_run(n, 0, None, 6, InitialValidation(), PolicyCalibration(str(tmp_path / str(n)), "response"))
        for n in (1, 2)
    ]
    check_same(*runs)
    one, two = (read(tmp_path / str(n))["validations"] for n in (1, 2))
    assert [row["iteration"] for row in one] == [row["iteration"] for row in two] == [0, 2]
    for row, other in zip(one, two, strict=True):
        for kind, numbers in row["data_sets"]["few"].items():
            assert other["data_sets"]["few"][kind] == pytest.approx(numbers, abs=5e-6)
        assert "token_probability" in row["data_sets"]["few"]


def test_a_sanity_check_leaves_nothing(tmp_path: Path) -> None:
    chain = [*stages(Answers()), PolicyCalibration(str(tmp_path / "p"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_of(chain, val_check_interval=100, max_steps=2, num_sanity_val_steps=1).fit(
            sppo(tmp_path, words=WORDS), datamodule=data()
        )
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("setting", ["bins", "every_n_validations"])
def test_settings_that_draw_nothing_are_refused(setting: str) -> None:
    with pytest.raises(InputError, match=f"`PolicyCalibration.{setting}`=0 draws nothing; use 1 or more"):
        PolicyCalibration(**{setting: 0})  # type: ignore[arg-type]


def test_tokens_that_nobody_knows_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"`PolicyCalibration\.tokens`='prompt' is no part of a response; use answer"
    ):
        PolicyCalibration(tokens="prompt")  # type: ignore[arg-type]
