import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from scripted_run import BAD, GOOD, OPEN, PAIR, Calls, GivesSpares, RowAsScore, SamplesAgain, Scripted, fit, rows
from tiny_run import Words, data, sppo, trainer_of
from toy_pipeline import Recites, Scored, Toy, loader

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.callbacks import DynamicSampling, RolloutGeneration
from sppo_lightning.callbacks.dynamic_sampling import replace_prompts
from sppo_lightning.data import PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError


def assert_as_sampled_at_once(batch: PromptBatch, again: PromptBatch) -> None:
    """The rollouts are those of the batch's own prompts, ids and visits, in the order of the prompts."""
    for mixed, whole in ((batch.rollouts, again.rollouts), (batch.greedy_rollouts, again.greedy_rollouts)):
        if mixed is None or whole is None:
            assert mixed is whole is None
            continue
        assert [p.row for p in mixed.prompts] == [p.row for p in whole.prompts]
        assert mixed.prompt_index.tolist() == whole.prompt_index.tolist()
        assert mixed.responses == whole.responses
        assert mixed.finish_reasons == whole.finish_reasons
        for name in ("prompt_ids", "response_ids", "sampled_log_probs"):
            mask = "prompt_mask" if name == "prompt_ids" else "response_mask"
            for a, b in zip(range(len(mixed)), range(len(whole)), strict=True):
                torch.testing.assert_close(
                    getattr(mixed, name)[a][getattr(mixed, mask)[a].bool()],
                    getattr(whole, name)[b][getattr(whole, mask)[b].bool()],
                )


@pytest.mark.parametrize("greedy", [False, True])
def test_exactly_the_uninformative_prompts_are_replaced(tmp_path: Path, greedy: bool):
    calls, again = Calls(), SamplesAgain()
    # 1, 3 and 5 say nothing; of the spares 5 and 6 one takes the place of 1, and 8 that of 3 in a second round
    script, spares = Scripted({1: BAD, 3: (0.0, 0.0), 5: OPEN}), GivesSpares([5, 6, 8, 9])
    shaping = RowAsScore(role="shaping", weight=0.5)
    stages = [script, shaping, calls, DynamicSampling(), again]
    recorder = fit(tmp_path, spares, *stages, greedy=greedy, limit_train_batches=2)
    assert calls.rows == [[0, 1, 2, 3], [5, 6], [8], [4, 5, 6, 7], [9]]
    assert [rows(batch) for batch, _ in again.seen] == [[0, 6, 2, 8], [4, 9, 6, 7]]
    assert [batch.visits for batch, _ in again.seen] == [[0, -7, 0, -9], [0, -10, 0, 0]]
    for batch, whole in again.seen:
        assert_as_sampled_at_once(batch, whole)
        assert (batch.greedy_rollouts is not None) == greedy
        assert batch.rollouts is not None
        assert batch.rollouts.rewards.tolist() == [1.0, 0.0] * 4
    # the running mean is 0, and then that of the rows 0, 6, 2 and 8
    assert [batch.rollouts.shaping[::2].tolist() for batch, _ in again.seen] == [[0, 3, 1, 4], [0, 2.5, 1, 1.5]]  # type: ignore[union-attr]
    names = ("rollout/informative_fraction", "rollout/resampled_prompts", "rollout/sampling_rounds", "reward/mean")
    names += ("reward/scripted", "reward/row_as_score")
    first, second = recorder.iterations
    assert [first[name] for name in names] == [0.5, 3, 2, 0.5, 0.5, 4.0]
    assert [second[name] for name in names] == [0.75, 1, 1, 0.5, 0.5, 6.5]


def test_what_is_counted_in_a_round_adds_up(tmp_path: Path):
    calls = Calls()
    recorder = fit(
        tmp_path,
        GivesSpares([5, 6, 8]),
        Scripted({0: OPEN, 1: BAD, 5: OPEN}),
        calls,
        DynamicSampling(),
        greedy=True,
    )
    assert calls.rows == [[0, 1, 2, 3], [5, 6], [8]]
    ((metrics,), (phases,)) = recorder.iterations, recorder.phases
    assert metrics["verifier/scripted/no_verdict"] == 4  # of the rows 0 and 5 one sampled and the greedy one
    assert metrics["verifier/scripted/errors"] == 0
    assert 0.12 <= metrics["verifier/scripted/seconds"] <= phases["verify"]  # 3 × 2 calls of `score`
    seconds = metrics["rollout/seconds"]
    assert metrics["rollout/tokens_per_second"] * seconds == pytest.approx(sum(calls.tokens), rel=1e-4)
    assert seconds <= phases["rollout"]


@pytest.mark.parametrize("max_rounds", [1, 2])
def test_after_the_last_round_a_prompt_stays(tmp_path: Path, max_rounds: int):
    calls, again = Calls(), SamplesAgain()
    stages = [Scripted({2: GOOD}, BAD), calls, DynamicSampling(max_rounds), again]
    recorder = fit(tmp_path, GivesSpares([8, 9, 10, 11, 12, 13, 14]), *stages)
    assert calls.rows == [[0, 1, 2, 3], [8, 9, 10], [11, 12, 13]][: max_rounds + 1]
    ((batch, whole),) = again.seen
    assert rows(batch) == [0, 1, 2, 3]
    assert_as_sampled_at_once(batch, whole)
    (metrics,) = recorder.iterations
    assert metrics["rollout/informative_fraction"] == 0.25
    assert metrics["rollout/sampling_rounds"] == max_rounds
    assert metrics["rollout/resampled_prompts"] == 3 * max_rounds


def test_responses_without_a_verdict_do_not_differ(tmp_path: Path):
    calls = Calls()
    silent = {0: (None, None, None), 1: (0.0, None, 0.0), 2: (0.0, None, 1.0), 3: (None, 0.5, None)}
    samples = Sampling(max_new_tokens=2, samples_per_prompt=3)
    stages = [RolloutGeneration(samples), Scripted(silent, (1.0, 1.0, 0.5)), calls, DynamicSampling()]
    trainer_of(stages, limit_train_batches=1).fit(sppo(tmp_path), GivesSpares([7, 8, 9]))
    assert calls.rows == [[0, 1, 2, 3], [7, 8, 9]]


def test_responses_that_a_shaping_verifier_masks_do_not_differ(tmp_path: Path):
    calls = Calls()
    mask = Scored(lambda response: None, role="shaping")
    fit(tmp_path, GivesSpares([7, 8, 9, 10]), Scripted({}), mask, calls, DynamicSampling(1))
    assert calls.rows == [[0, 1, 2, 3], [7, 8, 9, 10]]


def test_an_informative_batch_is_left_alone(tmp_path: Path):
    calls = Calls()
    recorder = fit(tmp_path, GivesSpares([]), Scripted({}), calls, DynamicSampling())
    assert calls.rows == [[0, 1, 2, 3]]
    (metrics,) = recorder.iterations
    assert metrics["rollout/informative_fraction"] == 1.0
    assert metrics["rollout/sampling_rounds"] == metrics["rollout/resampled_prompts"] == 0


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_only_training_batches_are_changed(tmp_path: Path, loop: str):
    calls = Calls()
    # one sample each and no spare prompts, which only training needs
    trainer = trainer_of(
        [RolloutGeneration(Sampling(max_new_tokens=2)), Scripted({}, BAD), calls, DynamicSampling()]
    )
    getattr(trainer, loop)(sppo(tmp_path), data(("easy",)))
    assert calls.rows == [list(range(8))]
    assert not [name for name in trainer.callback_metrics if name.startswith("rollout/")]


def test_validation_inside_fit_is_not_changed(tmp_path: Path):
    calls = Calls()
    module_data = data(("easy",))
    stages = [RolloutGeneration(PAIR), Scripted({}, BAD), calls, DynamicSampling(1)]
    trainer_of(stages, limit_train_batches=1, val_check_interval=1).fit(sppo(tmp_path), module_data)
    assert [len(each) for each in calls.rows] == [8, 8, 8]  # the batch, a round of spares, the validation
    assert calls.rows[2] == list(range(8))


class Draws(Callback):
    """Writes down each iteration's rows and visits, and ends the run where that is asked for."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[list[tuple[int, int]]] = []
        self.stop = stop

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, *_: Any
    ) -> None:
        self.seen.append(list(zip(rows(batch), batch.visits, strict=True)))
        trainer.should_stop = len(self.seen) == self.stop


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [1, 3], ids=["mid-epoch", "second epoch"])
def test_a_resumed_run_draws_the_same_spares(tmp_path: Path, stop: int):
    def run(draws: Draws, checkpoint: str | None = None) -> list[list[tuple[int, int]]]:
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        script = Scripted({row: BAD for row in range(1, 32, 2)})
        stages = [RolloutGeneration(PAIR), script, DynamicSampling(2), draws, saved]
        trainer = trainer_of(stages, max_epochs=3, limit_train_batches=2, enable_checkpointing=True)
        trainer.fit(sppo(tmp_path), data(()), ckpt_path=checkpoint, weights_only=False)
        return draws.seen

    undisturbed = run(Draws())
    assert len(undisturbed) == 6
    visits = {visit for iteration in undisturbed for _, visit in iteration}
    assert {0, 1, 2, -1} <= visits
    assert min(visits) <= -6
    first = run(Draws(stop))
    assert first[:stop] == undisturbed[:stop]
    # four updates an iteration: 8 prompts of 2 responses in mini-batches of 4
    assert run(Draws(), str(tmp_path / f"step={4 * stop}.ckpt")) == undisturbed[stop:]


class WritesDraws(Draws):
    """Writes what its rank saw to a file, since a forked rank takes everything else with it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps([self.seen, logged]))


@pytest.mark.filterwarnings("ignore")
def test_a_rank_that_needs_nothing_keeps_pace(tmp_path: Path):
    def informative(row: int) -> bool:
        return row % 2 == 0 if row < 8 else row % 3 == 0

    prompts = PromptDataModule(Words(48), batch_size=8, shuffle=False, seed=5)
    script = Scripted({row: BAD for row in range(48) if not informative(row)})
    shaping = RowAsScore(role="shaping", weight=0.01)
    stages = [RolloutGeneration(PAIR), script, shaping, DynamicSampling(8), WritesDraws(tmp_path)]
    module = sppo(tmp_path)
    # ranks that wait for each other in different places fail after the timeout
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=30))
    trainer_of(stages, limit_train_batches=1, strategy=strategy, devices=2).fit(module, prompts)
    (first, metrics), (second, same) = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))

    found: list[list[int]] = []
    rounds = drawn = 0
    while len(found) < 4:  # ranks interleave, so that the first rank has the even rows, the second the odd ones
        share = np.random.default_rng([5, rounds, 1]).permutation(48).tolist()[1::2][: 4 - len(found)]
        drawn += len(share)
        found += [[row, -1 - rounds] for row in share if informative(row)]
        rounds += 1
    assert 1 < rounds < 8
    assert first == [[[0, 0], [2, 0], [4, 0], [6, 0]]]
    assert second == [found]
    for logged in (metrics, same):
        assert logged["rollout/informative_fraction"] == 0.5
        assert logged["rollout/resampled_prompts"] == drawn
        assert logged["rollout/sampling_rounds"] == rounds
        assert logged["reward/row_as_score"] == pytest.approx((12 + sum(row for row, _ in found)) / 8)


def sentence(*callbacks: Any, module: Any = None, prompts: Any = None) -> str:
    with pytest.raises(InputError) as raised:
        trainer_of(list(callbacks)).fit(module or Toy(), prompts or loader(["1"]))
    return str(raised.value)


def test_what_it_needs_is_said_at_setup(tmp_path: Path):
    assert sentence(Recites(), DynamicSampling()) == (
        "`trainer.callbacks` has no stage that provides the scores that DynamicSampling needs; add a verifier such "
        "as sppo_lightning.callbacks.MathVerifier to it above DynamicSampling."
    )
    assert sentence(Recites(), DynamicSampling(), Scored()) == (
        "`trainer.callbacks` lists DynamicSampling before Scored, which provides the scores that it needs; move "
        "Scored above DynamicSampling."
    )
    assert sentence(Recites(), Scored(), DynamicSampling(), Scored(name="late")) == (
        "`trainer.callbacks` lists DynamicSampling before Scored, whose scores are part of the reward; move Scored "
        "above DynamicSampling."
    )
    assert sentence(Recites(), Scored(), DynamicSampling()) == (
        "DynamicSampling needs spare prompts, which a loader does not give; use sppo_lightning.data.PromptDataModule, "
        "or write its `spare_prompts(count)`."
    )
    alone = sentence(
        RolloutGeneration(), Scripted({}), DynamicSampling(), module=sppo(tmp_path), prompts=GivesSpares([])
    )
    assert alone == (
        "`RolloutGeneration.sampling.samples_per_prompt`=1 leaves DynamicSampling no responses to compare; use 2 or "
        "more, or leave DynamicSampling out of `trainer.callbacks`."
    )
    with pytest.raises(InputError) as raised:
        DynamicSampling(max_rounds=0)
    assert str(raised.value) == (
        "`DynamicSampling.max_rounds`=0 samples nothing anew; use 1 or more, or leave DynamicSampling out of "
        "`trainer.callbacks`."
    )


def test_v_goes_with_its_prompt():
    batches = [
        PromptBatch([Prompt(str(i), "", "given", i) for i in rows], [[i] for i in rows], list(rows))
        for rows in ((0, 1, 2), (7, 8))
    ]
    batch, spare = batches
    batch.value_logits, spare.value_logits = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([7.0, 8.0])
    replace_prompts(batch, {1: 1, 2: 0}, spare)
    assert [prompt.row for prompt in batch.prompts] == [0, 8, 7]
    assert batch.value_logits.tolist() == [0.0, 8.0, 7.0]
