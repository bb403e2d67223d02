from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sppo_lightning.batch import Prompt
from sppo_lightning.data import PromptDataModule
from sppo_lightning.data.formatting import PromptFormat
from sppo_lightning.data.loader import PromptLoader
from sppo_lightning.errors import InputError


@pytest.fixture
def make_loader(tokenizer):
    def make(size, batch_size, **settings):
        prompts = [Prompt(text="one", gold="", dataset="train", row=i) for i in range(size)]
        return PromptLoader(prompts, PromptFormat(tokenizer), batch_size, **settings)

    return make


def rows(batch):
    return [prompt.row for prompt in batch.prompts]


def epoch_of(loader):
    return [rows(batch) for batch in loader]


def test_training_drops_the_last_batch_and_validation_keeps_it(make_loader):
    train = make_loader(7, 3, train=True)
    assert (len(train), epoch_of(train)) == (2, [[0, 1, 2], [3, 4, 5]])
    validation = make_loader(7, 3)
    assert (len(validation), epoch_of(validation)) == (3, [[0, 1, 2], [3, 4, 5], [6]])


def test_the_batch_holds_ids_and_visits(make_loader):
    train, validation = make_loader(4, 2, train=True), make_loader(4, 2)
    for epoch in range(3):
        for batch in train:
            assert (batch.token_ids, batch.visits) == ([[6], [6]], [epoch, epoch])
        assert [batch.visits for batch in validation] == [[0, 0], [0, 0]]


def test_ranks_interleave_and_all_yield_the_same_number_of_batches(make_loader):
    # 9 prompts in global batches of 4, on 4 ranks: the last batch holds one prompt, on rank 0
    shares = [epoch_of(make_loader(9, 4, rank=rank, world_size=4)) for rank in range(4)]
    assert shares == [[[0], [4], [8]], [[1], [5], []], [[2], [6], []], [[3], [7], []]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_slice_of_the_global_batch_is_the_same_set_for_any_number_of_ranks(make_loader, world_size):
    settings = {"train": True, "shuffle": True, "seed": 3, "world_size": world_size}
    ranks = [epoch_of(make_loader(24, 12, rank=rank, **settings)) for rank in range(world_size)]
    order = np.random.default_rng([3, 0]).permutation(24).tolist()
    for batch in range(2):
        for half in range(2):  # two mini-batches of 6
            share = slice(half * 6 // world_size, (half + 1) * 6 // world_size)
            seen = {row for rank in ranks for row in rank[batch][share]}
            assert seen == set(order[batch * 12 + half * 6 :][:6])


def test_each_epoch_has_an_order_of_its_own_that_depends_on_seed_and_epoch_alone(make_loader):
    loader, twin, other = (make_loader(50, 50, train=True, shuffle=True, seed=seed) for seed in (1, 1, 2))
    first, second = epoch_of(loader)[0], epoch_of(loader)[0]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert [epoch_of(twin)[0], epoch_of(twin)[0]] == [first, second]
    assert epoch_of(other)[0] not in (first, second)


def test_an_iterator_that_nothing_was_drawn_from_changes_nothing(make_loader):
    loader = make_loader(4, 2, train=True)
    iter(loader)
    expected = {"epoch": 0, "batches": 0, "spare_draws": 0, "prompts": 4, "batch_size": 2, "seed": 0}
    assert loader.state_dict() == expected
    assert next(iter(loader)).visits == [0, 0]
    assert next(iter(loader)).visits == [1, 1]  # a new iterator after a batch is a new epoch


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_loaded_state_goes_on_with_exactly_what_is_left(make_loader, stop):
    settings = {"train": True, "shuffle": True, "seed": 5}
    loader, resumed = make_loader(9, 3, **settings), make_loader(9, 3, **settings)
    whole = [batch for _ in range(4) for batch in epoch_of(loader)]
    loader = make_loader(9, 3, **settings)
    for _ in range(-(-stop // 3)):
        for batch in loader:
            state, last = loader.state_dict(), rows(batch)
            if last == whole[stop - 1]:
                break
    resumed.load_state_dict(state)
    assert [batch for _ in range(4) for batch in epoch_of(resumed)][: 12 - stop] == whole[stop:]


def test_a_state_of_other_data_is_refused_in_the_middle_of_an_epoch_alone(make_loader):
    loader = make_loader(8, 2, train=True)
    next(iter(loader))
    sentence = (
        "The checkpoint is from the middle of an epoch, which cannot go on with prompts=12 (then 8), "
        "batch_size=4 (then 2); resume with what it had, or start a new run from its weights."
    )
    with pytest.raises(InputError) as caught:
        make_loader(12, 4, train=True).load_state_dict(loader.state_dict())
    assert str(caught.value) == sentence
    epoch_of(loader)
    other = make_loader(12, 4, train=True)
    other.load_state_dict(loader.state_dict())
    assert next(iter(other)).visits == [2, 2, 2, 2]


def test_spares_depend_on_the_seed_and_the_number_of_draws_and_leave_the_epoch_alone(make_loader):
    settings = {"train": True, "shuffle": True, "seed": 3}
    loader, twin = make_loader(12, 4, **settings), make_loader(12, 4, **settings)
    undisturbed = epoch_of(make_loader(12, 4, **settings))
    orders = [np.random.default_rng([3, draw, 1]).permutation(12).tolist() for draw in range(3)]
    drawn = []
    for batch in loader:  # a draw after each batch, of 3, 0 and 5 prompts
        drawn.append(rows(batch))
        drawn.append(rows(loader.spare([3, 0, 5][len(drawn) // 2])))
    assert drawn[0::2] == undisturbed
    assert drawn[1::2] == [orders[0][:3], [], orders[2][:5]]
    assert [rows(twin.spare(count)) for count in (3, 0, 5)] == drawn[1::2]
    assert rows(make_loader(12, 4, train=True, seed=4).spare(12)) != orders[0]
    spare = twin.spare(2)
    assert spare.token_ids == [[6], [6]]
    assert spare.rollouts is None


def test_a_prompt_has_other_noise_each_time_it_comes(make_loader):
    loader = make_loader(6, 2, train=True, shuffle=True)
    batches = [batch for _ in range(3) for batch in loader] + [loader.spare(4) for _ in range(9)]
    batches += [loader.spare(20), loader.spare(20)]  # more than there are prompts
    keys = [(row, visit) for batch in batches for row, visit in zip(rows(batch), batch.visits, strict=True)]
    assert len(set(keys)) == len(keys) == 3 * 6 + 9 * 4 + 2 * 20
    assert all(visit < 0 for batch in batches[9:] for visit in batch.visits)


def test_spares_are_distinct_while_there_are_enough_and_disjoint_over_ranks(make_loader):
    ranks = [make_loader(10, 2, train=True, rank=rank, world_size=2) for rank in range(2)]
    order = np.random.default_rng([0, 0, 1]).permutation(10).tolist()
    assert [rows(loader.spare(5)) for loader in ranks] == [order[0::2], order[1::2]]
    again = [rows(loader.spare(8)) for loader in ranks]
    assert sorted(again[0][:5] + again[1][:5]) == list(range(10))
    assert [each[5:] for each in again] == [each[:3] for each in again]


def test_a_loaded_state_goes_on_with_the_next_spares(make_loader):
    settings = {"train": True, "shuffle": True, "seed": 5}
    loader, resumed, older = (make_loader(9, 3, **settings) for _ in range(3))
    next(iter(loader))
    loader.spare(2)
    loader.spare(0)
    state = loader.state_dict()
    expected = loader.spare(4)
    resumed.load_state_dict(state)
    spare = resumed.spare(4)
    assert rows(spare) == rows(expected)
    assert spare.visits == expected.visits == [-3] * 4
    del state["spare_draws"]  # as before there were any
    older.load_state_dict(state)
    assert older.spare(1).visits == [-1]
    assert rows(next(iter(older))) == rows(next(iter(resumed)))


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size", "sentence"),
    [
        (
            5,
            8,
            2,
            "`batch_size`=8 is more than the 5 training prompts, so there is no whole batch; use 4 or less.",
        ),
        (
            1,
            8,
            2,
            "There is 1 training prompt for 2 ranks; give at least one per rank, or use fewer ranks.",
        ),
        (99, 10, 4, "`batch_size`=10 cannot be shared by 4 ranks; use 8 or 12."),
        (99, 3, 4, "`batch_size`=3 cannot be shared by 4 ranks; use 4."),
    ],
)
def test_a_batch_size_that_does_not_fit_is_one_sentence(make_loader, size, batch_size, world_size, sentence):
    with pytest.raises(InputError) as caught:
        make_loader(size, batch_size, world_size=world_size, train=True)
    assert str(caught.value) == sentence


class Recorder(LightningModule):
    """Notes the rows and visits of each training batch, and takes one optimizer step on it."""

    def __init__(self, tokenizer):
        super().__init__()
        self.policy = SimpleNamespace(tokenizer=tokenizer)
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((tuple(rows(batch)), batch.visits[0]))
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        assert batch.visits == [0] * len(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class StopAfter(Callback):
    """Ends the run after a number of updates, as an interruption would."""

    def __init__(self, updates):
        self.updates = updates

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.updates


@pytest.fixture
def run(tokenizer, write_jsonl, tmp_path):
    train = write_jsonl([{"prompt": "one", "answer": i} for i in range(11)])
    validation = write_jsonl([{"prompt": "two", "answer": i} for i in range(3)], "validation.jsonl")

    def run(checkpoint=None, stop=99, callback=None, **settings):
        module = Recorder(tokenizer)
        data = PromptDataModule(train, {"small": validation}, batch_size=2, validation_batch_size=2, seed=7)
        trainer = Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StopAfter(stop), *([callback] if callback else [])],
            enable_checkpointing=callback is not None,
            **settings,
        )
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module.seen

    return run


# five batches an epoch, so that 5 and 10 are the end of one
@pytest.mark.parametrize("stop", [3, 5, 6, 10, 12])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 14, "max_epochs": -1},
        {"max_epochs": 3},
        {"max_steps": 14, "max_epochs": -1, "limit_train_batches": 3},
        {"max_epochs": 3, "val_check_interval": 2},
    ],
    ids=["steps", "epochs", "limited", "validating"],
)
def test_a_run_that_was_interrupted_draws_the_prompts_of_the_undisturbed_one(run, tmp_path, settings, stop):
    undisturbed = run(**settings)
    per_epoch = settings.get("limit_train_batches", 5)
    expected = []
    for epoch in range(5):
        order = np.random.default_rng([7, epoch]).permutation(11).tolist()
        expected += [((order[2 * b], order[2 * b + 1]), epoch) for b in range(per_epoch)]
    assert undisturbed == expected[: settings.get("max_steps", 15)]
    saved = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    before = run(stop=stop, callback=saved, **settings)
    assert before[:stop] == undisturbed[:stop]
    after = run(checkpoint=tmp_path / "saved" / f"step={stop}.ckpt", **settings)
    assert after == undisturbed[stop:]


def test_a_checkpoint_of_the_end_of_an_epoch_goes_on_with_the_next(run, tmp_path):
    undisturbed = run(max_epochs=3)
    saved = ModelCheckpoint(tmp_path / "saved", filename="end", save_on_train_epoch_end=True)
    run(stop=5, callback=saved, max_epochs=3)
    assert run(checkpoint=tmp_path / "saved" / "end.ckpt", max_epochs=3) == undisturbed[5:]


def test_overfitting_draws_the_same_batches_in_every_epoch(run):
    assert run(max_epochs=2, overfit_batches=2) == [((0, 1), 0), ((2, 3), 0), ((0, 1), 1), ((2, 3), 1)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_prompts_at_random_are_the_same_on_any_number_of_ranks(make_loader, world_size):
    loaders = [make_loader(12, 6, train=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    before = [loader.state_dict() for loader in loaders]
    drawn = sorted(row for loader in loaders for row in rows(loader.at_random(5)))
    assert drawn == sorted(np.random.default_rng([0, 0, 2]).permutation(12)[:5].tolist())
    assert sorted(row for loader in loaders for row in rows(loader.at_random(50))) == list(range(12))
    assert [loader.state_dict() for loader in loaders] == before
    assert {visit for loader in loaders for visit in loader.at_random(5).visits} == {0}
