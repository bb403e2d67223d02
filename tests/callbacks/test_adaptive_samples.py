"""More responses where the critic is unsure: on one rank or two, after a resume, ahead or not."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from chain_run import Fated, check_same, run
from lightning.pytorch import Callback, LightningModule, Trainer
from scripted_run import PAIR, Scripted
from tiny import loader, make_batch, make_chain_policy, make_chain_sppo, make_trainer
from tiny_run import data, sppo, trainer_of

from sppo_lightning import SPPOModule
from sppo_lightning.advantages import BatchMeanAdvantage
from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.callbacks import AdaptiveSamples, DynamicSampling, RolloutGeneration, RunSummary, Verifier
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.pipeline import Stage
from sppo_lightning.pooling import PooledAdvantage
from sppo_lightning.uncertainty import RecordVariance
from sppo_lightning.warmup import CriticWarmup


class Notes(Callback):
    """Writes down each iteration's responses on this rank, and keeps what was logged and learned from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logged: list[dict[str, float]] = []
        self.batches: list[PromptBatch] = []
        self.experiences: list[Any] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert batch.rollouts is not None
        keys = [
            (prompt.row, batch.visits[batch.rollouts.prompt_index[i]])
            for i, prompt in enumerate(batch.rollouts.prompts)
        ]
        with (self.folder / f"{trainer.world_size}-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(
                json.dumps([[*key, text] for key, text in zip(keys, batch.rollouts.responses, strict=True)]) + "\n"
            )
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.batches.append(batch)
        self.experiences.append(outputs["experience"])


def responses(folder: Path, ranks: int = 1) -> list[list[Any]]:
    """Sorted rows, visits and responses of each iteration, over all ranks."""
    parts = [(folder / f"{ranks}-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    return [sorted(entry for line in lines for entry in json.loads(line)) for lines in zip(*parts, strict=True)]


def adaptive(
    folder: Path, ranks: int = 1, steps: int = 10, stage: Any = None, **settings: Any
) -> tuple[Any, Notes]:
    """A run on the chain task whose budget is worth about two responses per prompt."""
    notes, stage = Notes(folder), stage or AdaptiveSamples(budget_tokens=100, max_samples=4)
    chosen: dict[str, Any] = {"advantage": PooledAdvantage(running_decay=0.5)} | settings
    return run(ranks, chosen.pop("silent", 0), None, steps, stage, notes, **chosen), notes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("silent", [0, 2], ids=["all judged", "one rank without verdicts"])
def test_two_processes_do_what_one_does(tmp_path: Path, silent: int) -> None:
    found = {}
    for ranks in (1, 2):
        stage = AdaptiveSamples(100, 4, RecordVariance())
        found[ranks], _ = adaptive(tmp_path, ranks, stage=stage, silent=silent)
    check_same(found[1], found[2])
    one, two = responses(tmp_path), responses(tmp_path, 2)
    assert one == two
    assert len(one) == 5
    assert all(8 < len(iteration) <= 32 for iteration in one)
    for name, value in found[1][1].items():
        if name.startswith("adaptive/"):
            assert found[2][1][name] == pytest.approx(value, abs=1e-6), name
    by_rank = [
        json.loads(line) for rank in range(2) for line in (tmp_path / f"2-{rank}.jsonl").read_text().splitlines()
    ]
    assert any(len(first) != len(second) for first, second in zip(by_rank[:5], by_rank[5:], strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefetch", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path: Path, prefetch: int) -> None:
    def part(name: str, steps: int, folder: Path | None = None, **settings: Any) -> tuple[Any, list[Any]]:
        (tmp_path / name).mkdir()
        stages = AdaptiveSamples(100, 4, RecordVariance()), Notes(tmp_path / name)
        advantage = PooledAdvantage(running_decay=0.5)
        found = run(1, 0, folder, steps, *stages, advantage=advantage, prefetch=prefetch, **settings)
        return found, responses(tmp_path / name)

    (whole, metrics), seen = part("whole", 10)
    _, first = part("cut", 6, tmp_path)
    (resumed, again), second = part("resumed", 10, ckpt_path=str(tmp_path / "1.ckpt"))
    assert first + second == seen
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    for name, value in metrics.items():
        if name.split("/")[0] in ("adaptive", "policy", "critic", "reward"):
            assert again[name] == pytest.approx(value, nan_ok=True), name
    assert metrics["critic/prior_strength"] != 4.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_with_prefetch_the_extra_responses_are_of_the_present_weights(tmp_path: Path) -> None:
    _, notes = adaptive(tmp_path, steps=6, prefetch=1)
    for number, batch in enumerate(notes.batches):
        assert batch.rollouts is not None
        versions = batch.rollouts.policy_versions.tolist()
        assert versions[:8] == [max(2 * number - 2, 0)] * 8
        assert versions[8:] == [2 * number] * batch.extra_responses
        assert batch.extra_responses > 0


class SamplesAgain(Stage):
    """Notes the batch that is trained on, and four responses to each of its prompts, asked for at once."""

    requires = frozenset({"rollouts"})

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        if trainer.training:
            engine = HFEngine()
            engine.update_weights(module.policy, trainer.global_step)  # type: ignore[arg-type]
            self.seen.append(
                (batch.rollouts, engine.generate(batch, Sampling(max_new_tokens=8, samples_per_prompt=4)))
            )


def test_extra_responses_are_the_prompts_next_samples() -> None:
    again = SamplesAgain()
    run(1, 0, None, 4, AdaptiveSamples(100, 4), again, advantage=PooledAdvantage())
    for rollouts, four in again.seen:
        counts = Counter[int]()
        assert len(rollouts) > 8
        for i, prompt in enumerate(rollouts.prompt_index.tolist()):
            row = 4 * prompt + counts[prompt]
            counts[prompt] += 1
            assert rollouts.responses[i] == four.responses[row]
            assert rollouts.prompts[i] == four.prompts[row]
            length = int(rollouts.response_mask[i].sum())
            torch.testing.assert_close(rollouts.sampled_log_probs[i, :length], four.sampled_log_probs[row, :length])


def test_a_budget_for_no_extra_response_is_sppo_bit_for_bit() -> None:
    plain, _ = run()
    sentence = (
        r"`AdaptiveSamples.budget_tokens`=9 is less than the \d\d tokens of one response per prompt, so there is no "
        "extra one; raise it, or leave AdaptiveSamples out."
    )
    with pytest.warns(UserWarning, match=sentence):
        same, metrics = run(1, 0, None, 6, AdaptiveSamples(9), advantage=PooledAdvantage())
    assert [name for name, value in plain.items() if not torch.equal(value, same[name])] == []
    assert (metrics["adaptive/samples_per_prompt"], metrics["adaptive/extra_samples"]) == (1.0, 0.0)
    assert metrics["adaptive/uncertainty_before"] == metrics["adaptive/uncertainty_after"]


def test_while_the_critic_warms_up_there_are_none(tmp_path: Path) -> None:
    _, notes = adaptive(tmp_path, steps=8, critic_warmup=CriticWarmup(updates=4))
    assert [batch.extra_responses > 0 for batch in notes.batches] == [False, False, True, True]


def test_responses_go_where_chance_decides_and_their_tokens_are_those_of_the_budget(tmp_path: Path) -> None:
    notes, summary, budget = Notes(tmp_path), RunSummary(str(tmp_path / "summary")), 160
    rate = GroupOptimizer(lr=1e-3)
    settings: dict[str, Any] = {"mini_batch_size": 12, "critic_optimizer": rate, "advantage": PooledAdvantage()}
    module = make_chain_sppo(1e-3, **settings)
    prompts = PromptDataModule(ChainTask({"1-3": 1.0}, size=24), batch_size=12, seed=3)
    adaptive = AdaptiveSamples(budget, 6, RecordVariance(decay=1.0))
    stages = [RolloutGeneration(Sampling(max_new_tokens=8)), Fated(), adaptive, notes, summary]
    make_trainer(*stages, max_steps=40, max_epochs=-1).fit(module, prompts)
    extra = Counter[bool]()
    for number, (logged, batch) in enumerate(zip(notes.logged, notes.batches, strict=True)):
        rollouts: Any = batch.rollouts
        if number >= 20:
            extra.update(prompt.row >= 16 for prompt in rollouts.prompts[12:])
        assert logged["adaptive/extra_samples"] == batch.extra_responses == len(rollouts) - 12 > 0
        assert logged["adaptive/samples_per_prompt"] == pytest.approx(len(rollouts) / 12)
        assert logged["adaptive/tokens"] == float(rollouts.response_mask.sum())
        assert logged["adaptive/budget_fraction"] == pytest.approx(logged["adaptive/tokens"] / budget)
        assert logged["adaptive/uncertainty_after"] < logged["adaptive/uncertainty_before"]
        assert max(Counter(rollouts.prompt_index.tolist()).values()) <= 6
        assert summary.curve[number]["responses"] == len(rollouts)
    assert extra[True] > 2 * extra[False]  # of a third of the prompts
    tokens = [logged["adaptive/tokens"] for logged in notes.logged[8:]]
    assert sum(tokens) / len(tokens) == pytest.approx(budget, rel=0.05)
    assert module.record.samples == sum(len(batch.rollouts) for batch in notes.batches)  # type: ignore[arg-type]


class BudgetEnds(Callback):
    """Leaves nothing for extra responses after the first iteration."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdaptiveSamples):
                callback.budget_tokens = 1


@pytest.mark.filterwarnings("ignore")
def test_a_batch_may_be_used_again(tmp_path: Path) -> None:
    module, notes = make_chain_sppo(1e-3, mini_batch_size=2, advantage=PooledAdvantage()), Notes(tmp_path)
    batch = make_batch(make_chain_policy(), ["1 +1 =", "2 +2 =", "3 =", "4 +3 ="])
    stages = [RolloutGeneration(Sampling(max_new_tokens=8)), Fated(), AdaptiveSamples(100, 3), notes, BudgetEnds()]
    make_trainer(*stages, max_epochs=2).fit(module, loader(batch))
    first, second = notes.experiences
    assert len(first) > 4
    assert len(second) == 4


class Brief(Verifier):
    """A response is right that has few words, whatever the prompt."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [float(len(text.split()) < 3) for text in responses]


def test_a_policy_learns_with_it(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    module = make_chain_sppo(5e-3, mini_batch_size=8, advantage=PooledAdvantage())
    prompts = PromptDataModule(ChainTask({"1-3": 1.0}, size=24), batch_size=8, seed=3)
    stages = [RolloutGeneration(Sampling(max_new_tokens=8)), Brief(), AdaptiveSamples(120, 4), notes]
    make_trainer(*stages, max_steps=40, max_epochs=-1).fit(module, prompts)
    rewards = [logged["reward/mean"] for logged in notes.logged]
    assert sum(rewards[:4]) / 4 < 0.5
    assert sum(rewards[-4:]) / 4 > 0.9


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_only_training_batches_are_changed(tmp_path: Path, loop: str) -> None:
    trainer = trainer_of([RolloutGeneration(PAIR), Scripted({}), AdaptiveSamples(1000)])
    getattr(trainer, loop)(sppo(tmp_path), data(("easy",)))
    assert not [name for name in trainer.callback_metrics if name.startswith("adaptive/")]


def sentence(*callbacks: Any, module: Any) -> str:
    with pytest.raises(InputError) as raised:
        trainer_of(list(callbacks)).fit(module, data(()))
    return str(raised.value)


def test_what_it_needs_is_said_at_setup(tmp_path: Path) -> None:
    one, adaptive, pooled = RolloutGeneration(), AdaptiveSamples(1000), sppo(tmp_path, advantage=PooledAdvantage())
    assert sentence(one, adaptive, Scripted({}), module=pooled) == (
        "`trainer.callbacks` lists AdaptiveSamples before Scripted, which provides the scores that it needs; move "
        "Scripted above AdaptiveSamples."
    )
    assert sentence(one, Scripted({}), adaptive, DynamicSampling(), module=pooled) == (
        "`trainer.callbacks` lists AdaptiveSamples and DynamicSampling, each of which decides alone what else is "
        "sampled; keep one of them."
    )
    without = SPPOModule(make_chain_policy(), advantage=BatchMeanAdvantage())
    assert sentence(one, Scripted({}), adaptive, module=without) == (
        "`trainer.callbacks` lists AdaptiveSamples, which goes by a critic that reads prompts, but there is none; use "
        "sppo_lightning.models.PromptCritic, or remove AdaptiveSamples."
    )
    assert sentence(one, Scripted({}), adaptive, module=sppo(tmp_path)) == (
        "`model.advantage`=SequenceAdvantage makes nothing of the extra responses that AdaptiveSamples adds to a "
        "prompt; use sppo_lightning.pooling.PooledAdvantage."
    )
    assert sentence(RolloutGeneration(PAIR), Scripted({}), adaptive, module=pooled) == (
        "`RolloutGeneration.sampling.samples_per_prompt`=2 gives every prompt so many responses before "
        "AdaptiveSamples chooses where they are worth it; use 1."
    )
    assert sentence(RolloutGeneration(greedy=True), Scripted({}), adaptive, module=pooled) == (
        "`RolloutGeneration.greedy`=true would sample a greedy response beside each extra one of AdaptiveSamples; "
        "use false."
    )
    with pytest.raises(InputError) as raised:
        AdaptiveSamples(budget_tokens=0)
    assert str(raised.value) == (
        "`AdaptiveSamples.budget_tokens`=0 is no number of tokens; use the prompts of an iteration times what you "
        "expect a response to be long, or more."
    )
    with pytest.raises(InputError) as raised:
        AdaptiveSamples(budget_tokens=9, max_samples=1)
    assert str(raised.value) == (
        "`AdaptiveSamples.max_samples`=1 leaves no extra response; use 2 or more, or leave AdaptiveSamples out of "
        "`trainer.callbacks`."
    )
