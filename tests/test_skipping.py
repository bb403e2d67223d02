"""An update with a number that is not finite: the run goes on as if it had not been tried."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chain_run import Parity
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from poisoned import (
    BESIDE,
    POISONED,
    Poison,
    Saves,
    Spoil,
    differences,
    in_backward,
    run,
    to_infinity,
    to_infinity_before,
    to_nan,
)
from test_docs import block_of
from tiny import make_chain_policy, make_chain_sppo, make_trainer

from sppo_lightning import SFTModule
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.skipping import DUMPS, SkippedUpdates


def assert_as_if_never_tried(folder: Path, poison: dict[str, Any], devices: int = 1) -> list[dict[str, float]]:
    callbacks = poison.pop("callbacks", [])
    found, logged = run(folder / "poisoned", *callbacks, devices=devices, **poison)
    expected, wanted = run(folder / "left", left=frozenset({3}), devices=devices)
    whole, _ = run(folder / "whole", devices=devices)
    assert found["skipped_updates"] == {"in_a_row": 0, "total": 1}
    assert found["global_step"] == 5
    assert len(found["advantage"]["records"]) == 20  # of the 24 prompts, those of five updates
    assert sorted(len(part) for part in found["critic_replay"]["stored"]) == [20 // devices] * devices
    assert [d for d in differences(found, expected) if not d.startswith(BESIDE)] == []
    assert [d for d in differences(found, whole) if d.startswith("/state_dict")]
    assert [row["update/skipped"] for row in logged] == [0.0, 1.0, 0.0]
    for mine, theirs in zip(logged, wanted, strict=True):
        names = [name for name in theirs if name.split("/")[0] in ("policy", "critic", "advantage", "reward")]
        assert {name: mine[name] for name in names} == {name: theirs[name] for name in names}
        assert all(value == value and abs(value) != float("inf") for value in mine.values()), mine
    return logged


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", [to_nan, to_infinity, to_infinity_before, in_backward])
def test_the_run_is_the_one_in_which_the_update_did_not_take_place(tmp_path: Path, spoil: Spoil) -> None:
    assert_as_if_never_tried(tmp_path, {"callbacks": [Poison(spoil, {POISONED})]})


@pytest.mark.filterwarnings("ignore")
def test_a_value_that_is_not_finite_reaches_nothing_that_outlives_the_iteration(tmp_path: Path) -> None:
    assert_as_if_never_tried(tmp_path, {"critic_rows": frozenset({POISONED})})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", [to_nan, to_infinity])
def test_all_ranks_skip_what_one_cannot_use(tmp_path: Path, spoil: Spoil) -> None:
    assert_as_if_never_tried(tmp_path, {"callbacks": [Poison(spoil, {POISONED})]}, devices=2)
    [file] = (tmp_path / "poisoned/skipped_updates").iterdir()  # of the rank that has the row
    dump = torch.load(file, weights_only=True)
    assert POISONED in [prompt["row"] for prompt in dump["prompts"]]


@pytest.mark.filterwarnings("ignore")
def test_what_is_kept_of_a_skipped_update(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    found, _ = run(tmp_path, Poison(to_nan, {POISONED}), kl_coef=0.1)
    [file] = (tmp_path / "skipped_updates").iterdir()
    assert file.name == "step-3-skipped-1-rank-0.pt"
    dump = torch.load(file, weights_only=True)
    wrong = ["policy/log_prob", "policy/old_log_prob", "policy/loss", "policy/kl", "policy/grad_norm"]
    assert dump["not_finite"] == wrong
    [told] = [str(w.message) for w in recwarn if "skipped" in str(w.message)]
    assert told == (
        f"The update after update 3 was skipped, because {', '.join(wrong)} are not finite with row {POISONED} of "
        f"'train'; its mini-batch is in {file} (1 skipped in a row, 1 in all)."
    )
    rows = [row["row"] for row in dump["prompts"]]
    assert rows == [12, 13, 14, 15]
    task = ChainTask({"1-3": 1.0}, size=24).rows()
    assert [row["gold"] for row in dump["prompts"]] == [str(task[row]["answer"]) for row in rows]
    assert [row["text"] for row in dump["prompts"]] == [task[row]["prompt"] for row in rows]
    bad = [row == POISONED for row in rows]
    assert dump["log_probs"].isnan().any(dim=1).tolist() == bad
    assert dump["log_probs"].isnan()[bad].sum() == dump["response_mask"][bad].sum()
    tokenizer = make_chain_policy().tokenizer
    mask = dump["response_mask"].bool()
    texts = [
        tokenizer.decode(ids[m], skip_special_tokens=True)
        for ids, m in zip(dump["response_ids"], mask, strict=True)
    ]
    assert dump["responses"] == texts
    assert (dump["sampled_log_probs"][mask] < 0).all()
    rewards = torch.tensor([(len(text.split()) + row) % 2 for text, row in zip(texts, rows, strict=True)])
    assert torch.equal(dump["rewards"], rewards.float())
    assert torch.equal(dump["scores"]["parity"], rewards.float())
    assert dump["verdicts"].all()
    assert dump["advantages"].shape == dump["values"].shape == (4,)
    assert (dump["global_step"], dump["rank"], dump["temperature"]) == (3, 0, 1.0)
    assert found["skipped_updates"]["total"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_gradient_alone_accuses_no_prompt(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run(tmp_path, Poison(in_backward, {POISONED}))
    [told] = [str(w.message) for w in recwarn if "skipped" in str(w.message)]
    assert told.startswith(
        "The update after update 3 was skipped, because policy/grad_norm is not finite; its mini-"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("devices", [1, 2])
def test_too_many_in_a_row_end_the_run_with_a_checkpoint(tmp_path: Path, devices: int) -> None:
    """Updates 2, 3 and 4 of six, so over the end of an iteration, and not the one that is alone."""
    poison = {0, *range(8, 20)}
    with pytest.raises(Exception, match="4 updates in a row were skipped") as raised:
        run(tmp_path, Poison(to_nan, poison | {20}), devices=devices, max_skipped_updates=4)
    if devices > 1:
        assert "InputError" in str(raised.value)
    else:
        assert isinstance(raised.value, InputError)
    [file] = tmp_path.glob("*.ckpt")
    for part in (
        "`max_skipped_updates`=4: policy/log_prob, policy/old_log_prob, policy/loss, policy/grad_norm are not finite",
        f"see {tmp_path}/skipped_updates/step-1-skipped-5-rank-0.pt",
        f"--ckpt_path {tmp_path}/skipped-step=1.ckpt`, which has the weights of the last good update",
    ):
        assert part in str(raised.value)
    found = torch.load(file, weights_only=True)
    expected, _ = run(tmp_path / "left", left=frozenset({0, 2, 3, 4, 5}), devices=devices)
    assert (found["global_step"], found["skipped_updates"]) == (1, {"in_a_row": 4, "total": 5})
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "advantage", "critic_replay"):
        assert differences(found[part], expected[part]) == [], part


@pytest.mark.filterwarnings("ignore")
def test_as_many_less_one_do_not(tmp_path: Path) -> None:
    _, logged = run(tmp_path, Poison(to_nan, {0, *range(8, 20)}), max_skipped_updates=4)
    assert [row["update/skipped"] for row in logged] == [1.0, 2.0, 1.0]
    run(tmp_path / "never", Poison(to_nan, set(range(24))), max_skipped_updates=None)


@pytest.mark.filterwarnings("ignore")
def test_the_run_ends_at_once_and_not_after_the_iteration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 updates in a row"):
        run(tmp_path, Poison(to_nan, {8, 12}), max_skipped_updates=1)
    assert [file.name for file in (tmp_path / "skipped_updates").iterdir()] == ["step-2-skipped-1-rank-0.pt"]


class Loads(Callback):
    """What a run begins with."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.counts = pl_module.skipped_updates.state_dict()


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    def fit(poison: set[int], **settings: Any) -> Any:
        seed_everything(5, verbose=False)
        module = make_chain_sppo(1e-2, max_skipped_updates=3)
        data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=24), batch_size=8, shuffle=False)
        loads = Loads()
        saved = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, every_n_epochs=1, save_top_k=-1)
        stages = RolloutGeneration(Sampling(max_new_tokens=4)), Parity(), Poison(to_nan, poison)
        limits = {"max_epochs": settings.pop("max_epochs", 1), "limit_val_batches": 0, "default_root_dir": tmp_path}
        trainer = make_trainer(*stages, loads, saved, enable_checkpointing=True, **limits)
        trainer.fit(module, data, **settings)
        return loads.counts, module.skipped_updates.state_dict(), trainer.global_step

    assert fit(set(range(16, 24))) == ({"in_a_row": 0, "total": 0}, {"in_a_row": 2, "total": 2}, 4)
    resume = {"ckpt_path": str(tmp_path / "epoch=0.ckpt"), "weights_only": False, "max_epochs": 2}
    with pytest.raises(InputError, match="^3 updates in a row were skipped"):
        fit({0}, **resume)
    resume["ckpt_path"] = str(tmp_path / "skipped-step=4.ckpt")  # which has nothing new against it
    assert fit(set(), **resume) == ({"in_a_row": 3, "total": 3}, {"in_a_row": 0, "total": 3}, 8)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_supervised_learning_skips_too(tmp_path: Path, devices: int) -> None:
    """The second of three updates has a weight at infinity, on the last rank alone."""

    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.norm = pl_module.policy.model.model.norm.weight.data
            self.before = self.norm.clone()
            if batch_idx == 1 and trainer.global_rank == devices - 1:
                self.norm[0] = float("inf")

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.fit_loop.batch_idx == 1:
                self.norm.copy_(self.before)

    class Leaves(SFTModule):
        tried = 0

        def step_optimizer(self, modules: Any, attempt: Any) -> bool:
            self.tried += 1
            if self.tried == 2:
                self.zero_grad()
                return False
            return super().step_optimizer(modules, attempt)

    def fit(kind: type[SFTModule], folder: Path, *callbacks: Callback) -> dict[str, Any]:
        seed_everything(5, verbose=False)
        module = kind(make_chain_policy(), GroupOptimizer(lr=1e-2), micro_batch_tokens=60)
        module.configure_model()
        data = PromptDataModule(train=ChainTask({"1-3": 1.0}, 24, demonstrations=True), batch_size=8, shuffle=False)
        folder.mkdir()
        more: dict[str, Any] = {"strategy": "ddp_fork"} if devices > 1 else {}
        trainer = make_trainer(
            *callbacks,
            Saves(folder / "end.ckpt"),
            devices=devices,
            default_root_dir=folder,
            limit_val_batches=0,
            **more,
        )
        trainer.fit(module, data)
        return torch.load(folder / "end.ckpt", weights_only=True)

    found = fit(SFTModule, tmp_path / "broken", Breaks())
    expected, whole = fit(Leaves, tmp_path / "left"), fit(SFTModule, tmp_path / "whole")
    assert found["global_step"] == 2
    assert found["skipped_updates"] == {"in_a_row": 0, "total": 1}
    assert [d for d in differences(found, expected) if not d.startswith(BESIDE)] == []
    assert differences(found["state_dict"], whole["state_dict"])
    [file] = (tmp_path / "broken/skipped_updates").iterdir()
    assert torch.load(file, weights_only=True)["rank"] == devices - 1


@pytest.mark.filterwarnings("ignore")
def test_a_rate_that_no_model_survives(tmp_path: Path) -> None:
    """Nothing is made up here: weights overflow, and what is sampled from them is no number either."""
    seed_everything(5, verbose=False)
    data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=24), batch_size=8)
    trainer = make_trainer(
        RolloutGeneration(Sampling(max_new_tokens=4)), Parity(), limit_val_batches=0, default_root_dir=tmp_path
    )
    with pytest.raises(InputError, match="^5 updates in a row were skipped"):
        trainer.fit(make_chain_sppo(1e30), data)
    weights = torch.load(tmp_path / "skipped-step=1.ckpt", weights_only=True)["state_dict"]
    assert all(weight.isfinite().all() for weight in weights.values())  # of the only update


@pytest.mark.filterwarnings("ignore")
def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    count = DUMPS + 2
    seed_everything(5, verbose=False)
    module = make_chain_sppo(1e-2, max_skipped_updates=None)
    data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=4 * count), batch_size=4)
    stages = RolloutGeneration(Sampling(max_new_tokens=4)), Parity(), Poison(to_nan, set(range(4 * count)))
    make_trainer(*stages, limit_val_batches=0, default_root_dir=tmp_path).fit(module, data)
    names = {file.name for file in (tmp_path / "skipped_updates").iterdir()}
    assert names == {f"step-0-skipped-{i}-rank-0.pt" for i in range(3, count + 1)}


@pytest.mark.parametrize("most", [0, -1])
def test_a_limit_that_no_run_would_meet(most: int) -> None:
    with pytest.raises(InputError, match=f"^`max_skipped_updates`={most} would stop a run that is well; use 1 to "):
        SkippedUpdates(most)


@pytest.mark.filterwarnings("ignore")
def test_the_page_reads_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, Poison(to_nan, {POISONED}))
    code = block_of("docs/when-it-goes-wrong.md", "python", "not_finite")
    name = next(word for word in code.split('"') if word.endswith(".pt"))
    capsys.readouterr()
    exec(code.replace(name, str(tmp_path / "skipped_updates/step-3-skipped-1-rank-0.pt")), {})
    text = ChainTask({"1-3": 1.0}, size=24).rows()[POISONED]["prompt"]
    assert capsys.readouterr().out.splitlines()[1] == str([text])
