"""Clipping, schedules, what is refused, and what is logged."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from by_hand import CASES, FAST, assert_equal, fit, run, weights
from tiny import AnyDigit, RecordingSPPO, loader, make_batch, make_critic, make_policy, make_trainer

from sppo_lightning import SPPOModule
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.models.loading import recompute_layers
from sppo_lightning.optim import GroupOptimizer


def test_gradients_are_clipped_module_by_module():
    class NoStep(RecordingSPPO):
        def configure_optimizers(self) -> Any:
            (optimizer,), schedules = super().configure_optimizers()
            optimizer.register_step_pre_hook(
                lambda *_: self.norms.append([self.norm(m) for m in (self.policy, self.critic)])
            )
            return [optimizer], schedules

        @staticmethod
        def norm(module: Any) -> float:
            return math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))

    module = NoStep(
        make_policy(),
        make_critic(),
        policy_optimizer=GroupOptimizer(max_grad_norm=0.125),
        critic_optimizer=GroupOptimizer(max_grad_norm=0.25),
    )
    module.norms = []
    trainer = fit(module, CASES)
    assert module.norms == [[pytest.approx(0.125, rel=1e-4), pytest.approx(0.25, rel=1e-4)]]
    assert float(trainer.callback_metrics["policy/grad_norm"]) > 0.125  # the norm before clipping


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, *((1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2, 3))]),
    ],
)
def test_learning_rates_by_update(schedule: Any, factors: list[float]):
    rates: list[list[float]] = []

    class Rates(SPPOModule):
        def step_optimizer(self, modules: Any, attempt: Any) -> Any:
            rates.append([group["lr"] for group in self.optimizers().param_groups])  # type: ignore[union-attr]
            return super().step_optimizer(modules, attempt)

    optimizers = {name: dataclasses.replace(settings, warmup_updates=2) for name, settings in FAST.items()}
    module = Rates(make_policy(), make_critic(), lr_schedule=schedule, mini_batch_size=4, **optimizers)
    trainer = fit(module, CASES, iterations=5, max_steps=6)
    assert trainer.global_step == 6
    assert rates == [[pytest.approx(0.02 * f), pytest.approx(0.05 * f)] for f in factors]


def test_a_decaying_rate_needs_an_end():
    with pytest.raises(InputError) as raised:
        run(lr_schedule="cosine")
    sentence = "`lr_schedule`='cosine' reaches zero at `trainer.max_steps`, which is not set; set it."
    assert str(raised.value) == sentence


def test_an_advantage_with_a_baseline_needs_a_critic():
    with pytest.raises(InputError) as raised:
        SPPOModule(make_policy())
    assert str(raised.value) == (
        "`advantage`=SequenceAdvantage needs a critic; set `model.critic` to "
        "sppo_lightning.models.PromptCritic, which reads the prompt alone."
    )


def test_metric_names_after_two_iterations():
    policy = make_policy()
    trainer = make_trainer(
        RolloutGeneration(Sampling(max_new_tokens=4), validation_greedy=True), AnyDigit(), max_epochs=1
    )
    batches = [make_batch(policy, [f"{a} + {b} =" for b in range(4)], first_row=4 * a) for a in (1, 2)]
    module = SPPOModule(policy, make_critic(), mini_batch_size=2, kl_coef=0.1)
    trainer.fit(module, loader(*batches), loader(make_batch(policy, ["5 + 5 =", "6 + 6 ="])))
    assert trainer.global_step == 4
    groups = {
        "rollout": ["response_tokens_mean", "truncated_fraction", "tokens_per_second"],
        "reward": ["mean", "any_digit"],
        "verifier/any_digit": ["errors", "timeouts", "no_verdict", "seconds"],
        "policy": ["loss", "clip_fraction", "approx_kl", "entropy", "grad_norm", "kl"],
        "critic": [
            "loss",
            "value_mean",
            "brier",
            "brier_skill",
            "auroc",
            "calibration_error",
            "pearson",
            "spearman",
            "grad_norm",
        ],
        "advantage": ["std", "positive_fraction"],
        "time": [f"{phase}{kind}" for phase in ("rollout", "verify", "update") for kind in ("", "_share")],
        "val/set0": ["avg@1", "pass@1", "greedy", "value_mean"]
        + [f"critic_{kind}" for kind in ("brier", "pearson", "spearman", "calibration_error")],
        "sampler": ["logprob_gap"],
    }
    metrics = trainer.callback_metrics
    missing = [
        f"{group}/{name}" for group, names in groups.items() for name in names if f"{group}/{name}" not in metrics
    ]
    assert missing == []
    assert float(metrics["sampler/logprob_gap"]) < 1e-5
    shares = [float(metrics[f"time/{phase}_share"]) for phase in ("rollout", "verify", "update")]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)],
)
def test_other_precisions(precision: str, dtype: torch.dtype):
    policy = make_policy()
    batches = [make_batch(policy, [f"{a} + {b} =" for b in range(4)], first_row=4 * a) for a in (1, 2)]
    module = SPPOModule(policy, make_critic(), mini_batch_size=2, kl_coef=0.1, **FAST)
    stages = RolloutGeneration(Sampling(max_new_tokens=4)), AnyDigit()
    trainer = make_trainer(*stages, precision=precision)
    before = weights(module)
    trainer.fit(module, loader(*batches), loader(make_batch(policy, ["5 + 5 =", "6 + 6 ="])))
    # under mixed precision the master weights stay float32
    assert {p.dtype for p in module.parameters()} == {dtype}
    states = trainer.optimizers[0].state.values()
    assert {state["exp_avg"].dtype for state in states} == {dtype}
    assert all(float((p - before[n]).abs().max()) > 0 for n, p in weights(module).items() if p.ndim > 1)
    assert [n for n, value in trainer.callback_metrics.items() if not torch.isfinite(value)] == []
    assert float(trainer.callback_metrics["sampler/logprob_gap"]) < (1e-6 if precision == "64-true" else 0.1)


def test_every_update_sees_the_weights_of_the_one_before_under_mixed_precision():
    """An iteration is one autocast context, which must not cache weights: Lightning's does not."""

    class Compares(SPPOModule):
        def kl_loss(self, rows: Any, log_probs: Any, tokens: Any) -> Any:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                fresh = self.policy(rows.rollouts)[0]
            gaps.append(float((fresh - log_probs).abs().max()))
            return super().kl_loss(rows, log_probs, tokens)

    gaps: list[float] = []
    module = Compares(make_policy(), make_critic(), mini_batch_size=2, **FAST)
    fit(module, CASES, precision="bf16-mixed")
    assert gaps == [0.0] * 4


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(precision: Any):
    calls: dict[bool, list[int]] = {}
    gradients = {}
    for checkpointing in (False, True):
        policy, critic = make_policy(), make_critic()
        if checkpointing:
            for model in (policy, critic):
                model.gradient_checkpointing = True
                recompute_layers(model.model, "model")
        counts = calls[checkpointing] = [0, 0]

        def count(which: int, counts: list[int] = counts) -> Any:
            return lambda *_: counts.__setitem__(which, counts[which] + torch.is_grad_enabled())

        policy.model.model.layers[0].self_attn.register_forward_hook(count(0))
        critic.model.model.layers[0].self_attn.register_forward_hook(count(1))
        module = RecordingSPPO(policy, critic, **FAST)
        trainer = make_trainer(RolloutGeneration(Sampling(max_new_tokens=6)), AnyDigit(), precision=precision)
        trainer.fit(module, loader(make_batch(policy, list(CASES))))
        gradients[checkpointing] = module.gradients[0]
    assert calls == {False: [1, 1], True: [2, 2]}
    assert_equal(gradients[True], gradients[False])
