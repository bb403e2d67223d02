import time
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny import Recites, TableVerifier, loader, make_batch, make_critic, make_policy, make_trainer

from sppo_lightning import SFTModule, SPPOModule
from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.data import ChainTask, PromptDataModule
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import Stage

NO_ROLLOUTS = (
    "`trainer.callbacks` has no stage that provides the rollouts that {who} needs; add "
    "sppo_lightning.callbacks.RolloutGeneration to it{where}."
)
NO_SCORES = (
    "`trainer.callbacks` has no stage that provides the scores that the module needs; add a verifier such as "
    "sppo_lightning.callbacks.MathVerifier to it."
)


class Notes(Stage):
    """Writes down in which loop it ran, with which prompts, and what the stages before it had added."""

    requires = frozenset({"rollouts"})
    phase = "verify"

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str], int]] = []

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        assert batch.rollouts is not None
        self.seen.append((trainer.state.stage.value, [p.text for p in batch.prompts], len(batch.rollouts)))  # type: ignore[union-attr]
        time.sleep(0.02)


class Unrelated(Callback):
    """A callback that is no stage."""


def run(*callbacks: Any, stage: str = "fit", module: LightningModule | None = None, **settings: Any) -> Any:
    policy = make_policy()
    module = module or SPPOModule(policy, make_critic())
    batch = make_batch(policy, ["1 +", "2 -"])
    trainer = make_trainer(*callbacks, **settings)
    getattr(trainer, stage)(module, loader(batch))
    return trainer, module, batch


def sentence(*callbacks: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as raised:
        run(*callbacks, **settings)
    return str(raised.value)


def table(score: float = 1.0) -> TableVerifier:
    return TableVerifier({("1 +", "3"): score, ("2 -", "a b"): 0.0})


def recites() -> Recites:
    return Recites({"1 +": ["3 <eos>"], "2 -": ["a b <eos>"]})


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_stages_run_on_every_batch_of_every_loop(stage: str):
    notes = Notes()
    run(Unrelated(), recites(), table(), notes, stage=stage)
    loop = {"fit": "train"}.get(stage, stage)
    assert notes.seen == [(loop, ["1 +", "2 -"], 2)]


def test_stages_only_add():
    _, _, batch = run(recites(), table(0.5))
    assert batch.rollouts.rewards.tolist() == [0.5, 0.0]
    assert batch.rollouts.responses == ["3", "a b"]
    assert [p.text for p in batch.prompts] == ["1 +", "2 -"]
    assert batch.visits == [0, 0]


def test_seconds_are_counted_by_phase():
    trainer, module, _ = run(recites(), table(), Notes())
    metrics = trainer.callback_metrics
    assert 0.02 <= float(metrics["time/verify"]) == pytest.approx(module.last_phase_seconds["verify"], rel=1e-6)
    assert float(metrics["time/rollout"]) == 0.0  # Recites has no phase
    total = sum(module.last_phase_seconds.values())
    assert float(metrics["time/verify_share"]) == pytest.approx(module.last_phase_seconds["verify"] / total)
    assert module.phase_seconds == {}  # the next iteration starts from zero


def test_validation_inside_fit_is_not_counted_as_training():
    left: list[dict[str, float]] = []

    class Watches(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            left.append(dict(pl_module.phase_seconds))  # type: ignore[arg-type]

    module = SPPOModule(make_policy(), make_critic())
    batch = make_batch(module.policy, ["1 +", "2 -"])  # type: ignore[arg-type]
    make_trainer(recites(), table(), Notes(), Watches()).fit(module, loader(batch), loader(batch, batch))
    assert left == [{}]


def test_supervised_learning_samples_only_to_validate():
    notes = Notes()
    module = SFTModule(make_policy())
    batch = make_batch(module.policy, ["1 +", "2 -"])  # type: ignore[arg-type]
    trainer = make_trainer(recites(), table(), notes)
    with pytest.raises(InputError, match="no demonstration"):
        trainer.fit(module, loader(batch))
    assert notes.seen == []
    make_trainer(recites(), table(), notes).validate(module, loader(batch))
    assert [loop for loop, *_ in notes.seen] == ["validate"]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_missing_stage_is_named(stage: str):
    assert sentence(stage=stage) == NO_ROLLOUTS.format(who="the module", where="")
    assert sentence(recites(), stage=stage) == NO_SCORES
    alone = NO_ROLLOUTS.format(who="TableVerifier", where=" above TableVerifier")
    assert sentence(table(), stage=stage) == alone


def test_prediction_needs_no_verifier_but_responses():
    _, _, batch = run(RolloutGeneration(Sampling(max_new_tokens=2)), stage="predict")
    assert len(batch.rollouts) == 2
    assert sentence(stage="predict") == NO_ROLLOUTS.format(who="the module", where="")


def test_a_shaping_score_is_no_reward():
    shaping = TableVerifier({}, role="shaping")
    assert sentence(recites(), shaping) == NO_SCORES


def test_a_stage_in_the_wrong_place_is_named():
    assert sentence(table(), recites()) == (
        "`trainer.callbacks` lists TableVerifier before Recites, which provides the rollouts that it needs; "
        "move Recites above TableVerifier."
    )
    assert sentence(table(), Unrelated(), RolloutGeneration(), stage="validate") == (
        "`trainer.callbacks` lists TableVerifier before RolloutGeneration, which provides the rollouts that it "
        "needs; move RolloutGeneration above TableVerifier."
    )


@pytest.mark.parametrize(
    ("setting", "value", "instead"),
    [
        ("gradient_clip_val", 1.0, "max_grad_norm` of `model.policy_optimizer` and `model.critic_optimizer"),
        ("accumulate_grad_batches", 4, "micro_batch_tokens` on `model"),
    ],
)
def test_trainer_settings_that_do_not_apply(setting: str, value: float, instead: str):
    assert sentence(recites(), table(), **{setting: value}) == (
        f"`trainer.{setting}`={value} does not apply here; remove it and set `{instead}` instead."
    )


def test_a_precision_that_scales_gradients_is_refused():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    assert sentence(recites(), table(), plugins=[plugin]) == (
        "`trainer.precision`=16-mixed multiplies gradients by a scale that `max_grad_norm` would take for their size; "
        "use bf16-mixed."
    )


@pytest.mark.parametrize(
    "settings", [{"gradient_clip_val": None}, {"gradient_clip_val": 0.0}, {"accumulate_grad_batches": 1}]
)
def test_trainer_settings_that_say_nothing(settings: dict[str, Any]):
    plain, as_usual, _ = run(recites(), table())
    trainer, module, _ = run(recites(), table(), **settings)
    assert trainer.global_step == plain.global_step == 1
    for name, value in as_usual.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_a_mini_batch_size_that_does_not_divide_stops_before_the_first_response():
    notes = Notes()
    module = SPPOModule(make_policy(), make_critic(), mini_batch_size=3)
    data = PromptDataModule(ChainTask({"1": 1}, 16), batch_size=16)
    trainer = make_trainer(RolloutGeneration(Sampling(samples_per_prompt=2)), table(), notes)
    with pytest.raises(InputError) as raised:
        trainer.fit(module, data)
    assert str(raised.value) == (
        "`mini_batch_size`=3 does not divide the 32 sequences of an iteration; use 2 or 4."
    )
    assert notes.seen == []


def test_process_must_be_written():
    with pytest.raises(NotImplementedError, match="Stage must define process"):
        Stage().process(PromptBatch([], [], []), make_trainer(), LightningModule())
