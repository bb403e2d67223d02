"""MemoryPlan: figures that add up, no trace in the run, and a way out where memory does not suffice."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import WritesDown
from lightning.pytorch import Callback
from tiny import KnowsWhatFollows, make_chain_policy, make_chain_sppo, make_trainer
from torch.multiprocessing import ProcessRaisedException

from sppo_lightning import SFTModule
from sppo_lightning.batching import micro_batches
from sppo_lightning.callbacks import ExactMatch, MemoryPlan, RolloutGeneration
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Engine, HFEngine, Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.models.loading import base_of
from sppo_lightning.ranks import rank_and_ranks
from sppo_lightning.replay import CriticReplay

UNITS = {"MiB": 2**20, "GiB": 2**30}


def fit(*checks: Any, tokens: int = 8, engine: Engine | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    module = make_chain_sppo(1e-2, **settings)
    data = PromptDataModule(train=ChainTask({"1-3": 1.0}, size=16), batch_size=8)
    stages = [RolloutGeneration(Sampling(max_new_tokens=tokens), engine=engine), ExactMatch(extract="whole")]
    trainer = make_trainer(*stages, *checks, max_epochs=1, limit_val_batches=0)
    trainer.fit(module, data)
    return module, trainer


def table(text: str) -> dict[str, float]:
    """The rows of the printed table, in bytes."""
    rows = re.findall(r"│ ([a-z][^│]*?) +│ +(-?[0-9.]+) (MiB|GiB) │", text)
    return {name: float(value) * UNITS[unit] for name, value, unit in rows}


def test_nothing_of_it_stays():
    checked, trainer = fit(MemoryPlan())
    state = torch.get_rng_state()
    plain, other = fit()
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.global_step == other.global_step == 4
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, checked.state_dict()[name]), name
    sampled = {
        name: value for name, value in other.callback_metrics.items() if not re.match("time|memory|.*second", name)
    }
    for name, value in sampled.items():
        torch.testing.assert_close(trainer.callback_metrics[name], value, atol=0, rtol=0, equal_nan=True)


def test_the_figures_are_those_of_the_models_and_add_up(capsys: pytest.CaptureFixture[str]):
    module, _ = fit(MemoryPlan(), tokens=64)
    printed = table(capsys.readouterr().out)
    policy, critic = (sum(p.numel() * 4 for p in m.parameters()) for m in (module.policy, module.critic))
    rounding = 0.06 * 2**20
    assert printed["weights of the policy"] == pytest.approx(policy, abs=rounding)
    assert printed["optimizer"] == pytest.approx(2 * (policy + critic), abs=rounding)
    assert printed["left"] == pytest.approx(printed["there"] - printed["needed at most"], rel=0.02)


def test_an_engine_that_samples_elsewhere_is_left_out(capsys: pytest.CaptureFixture[str]):
    class Elsewhere(Engine):
        """Samples with another engine, of which MemoryPlan knows nothing."""

        def __init__(self) -> None:
            self.inner = HFEngine()

        def update_weights(self, policy: Any, version: int) -> None:
            self.policy, self.version = policy, version
            self.inner.update_weights(policy, version)

        def stream(self, batch: Any, sampling: Sampling) -> Any:
            return self.inner.stream(batch, sampling)

    fit(MemoryPlan(), engine=Elsewhere())
    assert not any(name.startswith("rollout") for name in table(capsys.readouterr().out))


class Notes(Callback):
    """Keeps the tokens of each of the policy's forwards up to the first iteration, and counts backward passes."""

    def __init__(self) -> None:
        self.forwards: list[int] = []
        self.backwards = 0
        self.started = False

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = pl_module.policy.register_forward_pre_hook(
            lambda _, inputs: self.forwards.append(len(inputs[0]) * max(inputs[0].lengths))
        )

    def on_before_backward(self, *_: Any) -> None:
        self.backwards += not self.started

    def on_train_batch_start(self, *_: Any) -> None:
        self.handle.remove()
        self.started = True


@pytest.mark.parametrize("spare", [0, -1, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 20))])
def test_the_micro_batch_is_the_fullest_that_may_come(spare: int):
    longest = max(noted(micro_batch_tokens=1).forwards)
    budget = 2 * longest + spare
    lengths = range(longest - 8 + 1, longest + 1)  # of responses of 1 to 8 tokens to the longest prompt
    worst = max(n * max(map(len, micro_batches([n] * 8, budget))) for n in lengths)
    notes = noted(micro_batch_tokens=budget)
    assert worst <= max(notes.forwards) <= budget
    assert notes.backwards == 0  # or other callbacks would take it for the run's


def test_all_forwards_of_an_update_are_tried():
    """The reference's too, and the critic's of what is replayed."""

    class Counts(Callback):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.handles = [
                base_of(part.model).register_forward_pre_hook(lambda *_, name=name: self.calls.append(name))
                for name, part in (("reference", pl_module.reference), ("critic", pl_module.critic))
            ]

        def on_train_batch_start(self, *_: Any) -> None:
            for handle in self.handles:
                handle.remove()

    without, replayed = Counts(), Counts()
    fit(without, MemoryPlan(), kl_coef=0.1)
    fit(replayed, MemoryPlan(), kl_coef=0.1, critic_replay=CriticReplay())
    assert (without.calls.count("reference"), replayed.calls.count("reference")) == (1, 1)
    assert replayed.calls.count("critic") == without.calls.count("critic") + 1


class Starved(HFEngine):
    """Runs out of memory on the second rank."""

    def stream(self, batch: Any, sampling: Sampling) -> Any:
        if rank_and_ranks()[0] == 1:
            raise torch.OutOfMemoryError
        return super().stream(batch, sampling)


class WrittenDown(WritesDown, MemoryPlan):
    """What each rank raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder


@pytest.mark.slow
def test_a_rank_that_does_not_fit_ends_all(tmp_path: Path):
    module, data = make_chain_sppo(1e-2), PromptDataModule(train=ChainTask({"1-3": 1.0}, size=16), batch_size=8)
    stages = [RolloutGeneration(Sampling(max_new_tokens=8), engine=Starved()), ExactMatch(extract="whole")]
    trainer = make_trainer(*stages, WrittenDown(tmp_path), devices=2, strategy="ddp_fork", max_epochs=1)
    with pytest.raises(ProcessRaisedException):
        trainer.fit(module, data)
    own, other = ((tmp_path / rank).read_text() for rank in ("1", "0"))  # the other has memory enough
    assert re.match("`max_tokens`=.* do not fit into memory; use", own)
    assert other == own


def noted(**settings: Any) -> Notes:
    notes = Notes()
    fit(notes, MemoryPlan(), mini_batch_size=8, **settings)
    return notes


def test_supervised_learning_has_no_plan():
    trainer = make_trainer(RolloutGeneration(Sampling(max_new_tokens=4)), ExactMatch(), MemoryPlan())
    with pytest.raises(InputError, match="`model` is SFTModule; remove MemoryPlan"):
        trainer.fit(SFTModule(make_chain_policy()), KnowsWhatFollows([]))  # type: ignore[arg-type]


SCARCE = """
import resource, sys
sys.path[:0] = {paths}
import torch
from test_memory_plan import fit
from sppo_lightning.callbacks import MemoryPlan
from sppo_lightning.errors import InputError
torch.set_num_threads(1)
class Scarce(MemoryPlan):
    def on_train_start(self, trainer, module):
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + {spare}, size + {spare}))
        super().on_train_start(trainer, module)
try:
    fit(Scarce(), {settings})
except InputError as error:
    print("InputError:", error)
"""


def scarce(spare: int, settings: str) -> str:
    """What a run says with `spare` bytes of address space to go, in a process of its own."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = SCARCE.format(paths=paths, spare=spare, settings=settings)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError:" in done.stdout or not done.returncode, done.stderr[-2000:]
    return done.stdout.partition("InputError: ")[2].strip()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as on Linux")
@pytest.mark.parametrize(
    ("spare_mib", "settings", "message"),
    [
        (
            16,
            "tokens=2000, mini_batch_size=8, micro_batch_tokens=2**17",
            r"`model.micro_batch_tokens`=131072 does not fit into memory with 8 responses of (\d+) tokens, prompt "
            r"included; use (\d+)\.",
        ),
        (
            12,
            "tokens=6000, mini_batch_size=8",
            r"`max_tokens`=1048576 of HFEngine lets 8 responses of up to (\d+) tokens be decoded at once, which do "
            r"not fit into memory; use (\d+)\.",
        ),
    ],
    ids=["update", "rollout"],
)
def test_what_does_not_fit_names_what_does(spare_mib: int, settings: str, message: str):
    # where the allocator begins elsewhere, a little less or more is what some rows, but not all, fit into
    tries = (scarce(int(spare_mib * share * 2**20), settings) for share in (1, 0.7, 1.4, 2, 0.5))
    found = next(filter(None, (re.fullmatch(message, said) for said in tries)), None)
    assert found
    longest, fits = map(int, found.groups())
    assert fits in (longest, 2 * longest, 4 * longest)


def test_data_that_do_not_say_how_long_prompts_are():
    module = make_chain_sppo(1e-2)
    trainer = make_trainer(RolloutGeneration(Sampling(max_new_tokens=4)), ExactMatch(), MemoryPlan())
    with pytest.raises(
        InputError, match="the data are a KnowsWhatFollows; use sppo_lightning.data.PromptDataModule"
    ):
        trainer.fit(module, KnowsWhatFollows([None]))  # type: ignore[arg-type, list-item]


def test_without_rollout_generation():
    trainer = make_trainer(MemoryPlan())
    with pytest.raises(InputError, match="RolloutGeneration"):
        trainer.fit(make_chain_sppo(1e-2), KnowsWhatFollows([]))  # type: ignore[arg-type]
