"""Curricula in real runs: what they are told, when they draw, on one rank or many, and after a resume."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain_run import Fated, check_same, grpo, ppo, run
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny import make_chain_policy, make_chain_sppo, make_trainer

from sppo_lightning import SFTModule
from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.data import (
    ChainTask,
    Curriculum,
    PassRateCurriculum,
    PromptDataModule,
    SolvabilityCurriculum,
    StagedCurriculum,
    UniformSampling,
)
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError

CURRICULA: dict[str, Callable[[], Curriculum]] = {
    "uniform": UniformSampling,
    "pass rate": lambda: PassRateCurriculum(prior_strength=0.5, half_life_iterations=3.0, floor=0.05),
    "solvability": lambda: SolvabilityCurriculum(rescore_every_n_iterations=2, floor=0.05),
    "stages": lambda: StagedCurriculum("operations", stages=2, threshold=0.1, min_iterations=1),
}


class Notes(Callback):
    """Writes down each iteration's rows and visits on this rank, and keeps what it logged and learned from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logged: list[dict[str, float]] = []
        self.experiences: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        with (self.folder / f"{trainer.world_size}-{trainer.global_rank}.jsonl").open("a") as file:
            pairs = [(prompt.row, visit) for prompt, visit in zip(batch.prompts, batch.visits, strict=True)]
            file.write(json.dumps(pairs) + "\n")
        metrics = trainer.callback_metrics.items()
        self.logged.append({k.removeprefix("curriculum/"): float(v) for k, v in metrics if "curriculum/" in k})
        self.experiences.append(outputs["experience"])


def drawn(folder: Path, ranks: int = 1) -> list[list[list[int]]]:
    """Sorted rows and visits of each iteration, over all ranks."""
    parts = [(folder / f"{ranks}-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    return [sorted(pair for line in lines for pair in json.loads(line)) for lines in zip(*parts, strict=True)]


def state_of(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=True)["PromptDataModule"]["curriculum"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CURRICULA)
def test_many_ranks_draw_what_one_does(tmp_path: Path, name: str) -> None:
    results = {}
    for ranks in (1, 2):
        notes = Notes(tmp_path)
        results[ranks] = run(ranks, 0, tmp_path, 10, notes, curriculum=CURRICULA[name]())
    check_same(results[1], results[2])
    first, second = (
        {k: v for k, v in metrics.items() if k.startswith("curriculum/")} for _, metrics in results.values()
    )
    assert {"curriculum/coverage", "curriculum/signal_per_token", "curriculum/nonzero_fraction"} <= set(first)
    assert second == {key: pytest.approx(value, abs=1e-6, rel=1e-6) for key, value in first.items()}
    assert drawn(tmp_path, 1) == drawn(tmp_path, 2)
    assert len({row for row, _ in drawn(tmp_path)[0]}) == 8
    one, two = (state_of(tmp_path / f"{ranks}.ckpt") for ranks in (1, 2))
    assert one.keys() == two.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0)
        else:
            assert two[key] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefetch", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CURRICULA)
def test_a_resumed_run_draws_and_learns_the_same(tmp_path: Path, name: str, prefetch: int) -> None:
    """Two iterations and two more are four, to the bit."""
    make = CURRICULA[name]
    for part in ("whole", "cut"):
        (tmp_path / part).mkdir()
    notes = Notes(tmp_path / "whole")
    whole, metrics = run(1, 0, None, 8, notes, curriculum=make(), prefetch=prefetch)
    cut = tmp_path / "cut"
    run(1, 0, cut, 4, Notes(cut), curriculum=make(), prefetch=prefetch)
    resumed, again = run(
        1, 0, None, 8, Notes(cut), curriculum=make(), prefetch=prefetch, ckpt_path=str(cut / "1.ckpt")
    )
    assert drawn(cut) == drawn(tmp_path / "whole")
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    for name, value in metrics.items():
        if name.split("/")[0] in ("curriculum", "reward", "policy", "critic"):
            assert again[name] == pytest.approx(value, rel=0, abs=0, nan_ok=True), name


class SavesWithin(Callback):
    """Saves in the third iteration, whose responses are there, and not learned from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 2:
            trainer.save_checkpoint(self.folder / "within.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefetch", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_checkpoint_from_within_an_iteration_draws_it_again(tmp_path: Path, prefetch: int) -> None:
    make, (whole, after) = CURRICULA["pass rate"], (tmp_path / "whole", tmp_path / "after")
    for folder in (whole, after):
        folder.mkdir()
    first, _ = run(1, 0, None, 10, Notes(whole), SavesWithin(tmp_path), curriculum=make(), prefetch=prefetch)
    checkpoint = str(tmp_path / "within.ckpt")
    again, _ = run(1, 0, None, 10, Notes(after), curriculum=make(), prefetch=prefetch, ckpt_path=checkpoint)
    assert drawn(after) == drawn(whole)[2:]
    assert [name for name, value in first.items() if not torch.equal(value, again[name])] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_another_number_of_ranks_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    make = CURRICULA["solvability"]
    run(1, 0, None, 10, Notes(tmp_path), curriculum=make())
    whole = drawn(tmp_path)
    run(1, 0, tmp_path, 4, curriculum=make())
    run(2, 0, None, 10, Notes(tmp_path), curriculum=make(), ckpt_path=str(tmp_path / "1.ckpt"))
    assert drawn(tmp_path, 2) == whole[2:]


class SaysWhen(PassRateCurriculum):
    """Keeps how many iterations it had learned from at each draw."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[int] = []

    def draw(self, count: int, epoch: int, batch: int) -> list[int]:
        self.draws.append(self.iteration)
        return super().draw(count, epoch, batch)


@pytest.mark.parametrize(
    ("prefetch", "expected"), [(0, [0, 1, 2, 3]), pytest.param(1, [0, 0, 1, 2, 3], marks=pytest.mark.slow)]
)
def test_a_batch_is_drawn_with_the_outcomes_of_the_one_before(prefetch: int, expected: list[int]) -> None:
    curriculum = SaysWhen()
    run(max_steps=8, curriculum=curriculum, prefetch=prefetch)
    assert curriculum.draws == expected


@pytest.mark.parametrize(
    "settings", [{}, {"silent": 2}, {"mini_batch_size": 32} | grpo(), ppo()], ids=["sppo", "silent", "grpo", "ppo"]
)
def test_what_is_logged_of_an_iteration(tmp_path: Path, settings: dict[str, Any]) -> None:
    notes = Notes(tmp_path)
    run(1, settings.pop("silent", 0), None, 6, notes, **{"mini_batch_size": 8} | settings)
    seen: set[int] = set()
    for logged, experience in zip(notes.logged, notes.experiences, strict=True):
        squares, tokens, moves = 0.0, 0, {}
        for i, prompt in enumerate(experience.rollouts.prompts):
            length = int(experience.rollouts.response_mask[i].sum())
            tokens += length
            own = experience.advantages[i].reshape(-1)[:length].double()
            moves.setdefault(prompt.row, False)
            if experience.verdicts[i]:
                squares += float(own.square().mean())
                moves[prompt.row] |= bool((own != 0).any())
                seen.add(prompt.row)
        assert logged["signal_per_token"] == pytest.approx(squares / tokens)
        assert logged["nonzero_fraction"] == pytest.approx(sum(moves.values()) / len(moves))
        assert logged["coverage"] == pytest.approx(len(seen) / 24)
    assert len(notes.logged) >= 3


def fated(
    curriculum: Curriculum, folder: Path, iterations: int, size: int = 8
) -> tuple[Notes, Any, PromptDataModule]:
    module, notes = make_chain_sppo(3e-3, mini_batch_size=size), Notes(folder)
    data = PromptDataModule(ChainTask({"1-3": 1.0}, size=24), batch_size=size, seed=3, curriculum=curriculum)
    stages = [RolloutGeneration(Sampling(max_new_tokens=8)), Fated(), notes]
    make_trainer(*stages, max_steps=iterations, max_epochs=-1).fit(module, data)
    return notes, module, data


def test_prompts_that_teach_nothing_are_left_by_their_record(tmp_path: Path) -> None:
    notes, _, data = fated(PassRateCurriculum(sharpness=2.0, prior_strength=0.5), tmp_path, 32, size=4)
    times = Counter(row for rows in drawn(tmp_path)[16:] for row, _ in rows)
    dead, alive = (sum(times[row] for row in rows) for rows in (range(16), range(16, 24)))
    assert dead + alive == 64
    assert alive > 36  # of 21 where all come alike
    rates = data.curriculum.pass_rates()  # type: ignore[attr-defined]
    assert rates[:8].min() > 0.8
    assert rates[8:16].max() < 0.2
    assert 0.2 < rates[16:].mean() < 0.8
    assert notes.logged[-1]["coverage"] == 1.0


def test_the_critic_scores_all_prompts_with_its_present_weights(tmp_path: Path) -> None:
    notes, module, data = fated(SolvabilityCurriculum(rescore_every_n_iterations=3), tmp_path, 6)
    curriculum: Any = data.curriculum
    values = module.prompt_values(data.training_batch(range(24))).double().numpy()
    assert curriculum.values == pytest.approx(values, abs=1e-6)
    assert np.ptp(curriculum.values) > 0.01
    assert [logged.get("staleness") for logged in notes.logged] == [None, None, None, 0.0, 1.0, 2.0]
    assert notes.logged[0]["expected_pass_rate"] == 0.5


def test_stages_advance_in_a_run(tmp_path: Path) -> None:
    settings = {"threshold": 0.05, "min_iterations": 2, "ramp_iterations": 0, "earlier_share": 0.25}
    curriculum = StagedCurriculum("operations", stages=2, **settings)
    notes, _, data = fated(curriculum, tmp_path, 6)
    stages = [logged["stage"] for logged in notes.logged]
    assert stages == sorted(stages)
    assert (stages[0], stages[-1]) == (0.0, 1.0)
    for rows, stage, logged in zip(drawn(tmp_path), stages, notes.logged, strict=True):
        easy = sum(curriculum.stage_of[row] == 0 for row, _ in rows) / 8
        assert logged["share_stage_0"] == easy
        assert easy == 1.0 if stage == 0 else easy < 1.0


def test_supervised_learning_has_no_rewards() -> None:
    data = PromptDataModule(
        ChainTask({"1-3": 1.0}, size=24, demonstrations=True), batch_size=8, curriculum=PassRateCurriculum()
    )
    with pytest.raises(InputError) as raised:
        make_trainer(max_steps=1).fit(SFTModule(make_chain_policy()), data)
    assert str(raised.value) == (
        "`data.curriculum`=PassRateCurriculum learns from rewards, which SFTModule has none of; leave it out."
    )


def test_without_a_critic_nothing_is_asked() -> None:
    with pytest.raises(InputError) as raised:
        run(curriculum=SolvabilityCurriculum(), **grpo())
    assert str(raised.value) == (
        "`data.curriculum`=SolvabilityCurriculum asks a critic, and `model.critic` is null; give one, or use "
        "PassRateCurriculum."
    )
