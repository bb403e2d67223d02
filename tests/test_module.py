"""SPPOModule and SFTModule against straightforward implementations of the same equations."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from tiny import Recites, RecordingSPPO, TableVerifier, loader, make_batch, make_critic, make_policy, make_trainer
from torch import Tensor

from sppo_lightning import SFTModule, SPPOModule
from sppo_lightning.batch import PromptBatch
from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import Sampling
from sppo_lightning.errors import InputError
from sppo_lightning.objectives import SequenceClipObjective, TokenClipObjective
from sppo_lightning.optim import GroupOptimizer

# prompt → its responses and their outcomes, of different lengths; None is no verdict
CASES: dict[str, list[tuple[str, float | None]]] = {
    "1 + 2 =": [("3 <eos>", 1.0)],
    "9 - 4 = ; a b c": [("5 5 5 5 5 <eos>", 0.25)],
    "2": [("7 8 9 a b c d e", 0.0)],
    "a + b - c": [("<eos>", 0.0)],
    "7 - 7 = 0 ; 1 +": [("1 = 1 <eos>", 1.0)],
    "8 8": [("d e f g", 0.5)],
    "4 ; 4 ; 4": [("k <eos>", 0.0)],
    "q r s t u": [("u t s r q p <eos>", 1.0)],
}
FAST = {
    "policy_optimizer": GroupOptimizer(lr=0.02, weight_decay=0.1, max_grad_norm=0.5),
    "critic_optimizer": GroupOptimizer(lr=0.05, weight_decay=0.0, max_grad_norm=100.0),
}


def stages(cases: Any, temperature: float = 1.0, shaping: Any = None) -> list[Any]:
    table = {
        (p, text.replace(" <eos>", "").replace("<eos>", "")): r for p, rows in cases.items() for text, r in rows
    }
    found: list[Any] = [Recites({p: [text for text, _ in rows] for p, rows in cases.items()}, temperature)]
    found.append(TableVerifier(table))
    if shaping is not None:
        found.append(
            TableVerifier({key: shaping[key[0]] for key in table}, name="shape", role="shaping", weight=0.5)
        )
    return found


def fit(module: SPPOModule, cases: Any, iterations: int = 1, temperature: float = 1.0, **settings: Any) -> Any:
    batches = [make_batch(module.policy, list(cases)) for _ in range(iterations)]  # type: ignore[arg-type]
    shaping = settings.pop("shaping", None)
    # double precision, because AdamW's first step is a sign, which rounding errors of small gradients flip
    trainer = make_trainer(*stages(cases, temperature, shaping), **{"precision": "64-true"} | settings)
    trainer.fit(module, loader(*batches))
    return trainer


def run(
    cases: Any = CASES, temperature: float = 0.7, critic: bool = True, **settings: Any
) -> tuple[RecordingSPPO, Any]:
    trainer_settings = {
        k: settings.pop(k) for k in ("iterations", "shaping", "max_steps", "precision") if k in settings
    }
    module = RecordingSPPO(make_policy(), make_critic() if critic else None, **FAST | settings)
    return module, fit(module, cases, temperature=temperature, **trainer_settings)


class ByHand:
    """The design's table, one response at a time, without padding, chunks, groups or Lightning."""

    def __init__(
        self, cases: Any = CASES, temperature: float = 0.7, shaping: Any = None, kl_coef: float = 0.0
    ) -> None:
        self.policy, self.critic = make_policy().double(), make_critic().double()
        self.reference = copy.deepcopy(self.policy)
        self.temperature, self.kl_coef = temperature, kl_coef
        self.optimizers = {
            "policy": torch.optim.AdamW(self.policy.parameters(), lr=0.02, weight_decay=0.1),
            "critic": torch.optim.AdamW(self.critic.parameters(), lr=0.05, weight_decay=0.0),
        }
        self.rows: list[dict[str, Any]] = []
        for prompt, responses in cases.items():
            for text, reward in responses:
                bonus = 0.0 if shaping is None else 0.5 * shaping[prompt]
                self.rows.append({"prompt": prompt, "text": text, "R": reward, "shaping": bonus})
        self.losses: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.begin_iteration()

    @torch.no_grad()
    def begin_iteration(self) -> None:
        for row in self.rows:
            row["V"] = torch.sigmoid(self.value(row["prompt"]))
            row["old"] = self.log_probs(self.policy, row)

    def value(self, prompt: str) -> Tensor:
        ids = torch.tensor([self.critic.tokenizer(prompt)["input_ids"]])
        return self.critic.model(input_ids=ids).logits[0, 0]

    def log_probs(self, policy: Any, row: dict[str, Any]) -> Tensor:
        prompt, response = (policy.tokenizer(row[key])["input_ids"] for key in ("prompt", "text"))
        logits = policy.model(input_ids=torch.tensor([prompt + response])).logits[0] / self.temperature
        table = torch.log_softmax(logits, dim=-1)
        return torch.stack([table[len(prompt) - 1 + t, token] for t, token in enumerate(response)])

    def policy_losses(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        tokens = sum(len(row["old"]) for row in rows)
        policy_loss, kl_loss = torch.zeros(2, dtype=torch.float64)
        for row in rows:
            advantage = row["R"] - row["V"] + row["shaping"]
            log_probs, reference = self.log_probs(self.policy, row), self.log_probs(self.reference, row).detach()
            for t in range(len(log_probs)):
                ratio = torch.exp(log_probs[t] - row["old"][t])
                term = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                if advantage < 0:
                    term = torch.max(term, 3.0 * advantage)
                policy_loss = policy_loss - term / tokens
                delta = log_probs[t] - reference[t]
                kl_loss = kl_loss + (torch.exp(-delta) + delta - 1) / tokens
        return policy_loss, kl_loss

    def update(self, chosen: list[int]) -> None:
        rows = [self.rows[i] for i in chosen]
        policy_loss, kl_loss = self.policy_losses(rows)
        critic_loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            v = self.value(row["prompt"])
            cross_entropy = -row["R"] * torch.nn.functional.logsigmoid(v)
            cross_entropy = cross_entropy - (1 - row["R"]) * torch.nn.functional.logsigmoid(-v)
            critic_loss = critic_loss + cross_entropy / len(rows)
        self.losses.append({"policy": policy_loss.item(), "critic": critic_loss.item(), "kl": kl_loss.item()})
        (policy_loss + critic_loss + self.kl_coef * kl_loss).backward()
        modules = {"policy": (self.policy, 0.5), "critic": (self.critic, 100.0)}
        self.gradients.append(
            {f"{n}.{k}": p.grad.clone() for n, (m, _) in modules.items() for k, p in m.named_parameters()}
        )
        for name, (module, max_norm) in modules.items():
            norm = torch.sqrt(sum(p.grad.square().sum() for p in module.parameters()))
            for p in module.parameters():
                p.grad *= min(1.0, max_norm / (norm.item() + 1e-6))
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def weights(module: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if not n.startswith("reference")}


def test_one_update_is_the_designs_table():
    module, trainer = run()
    expected = ByHand()
    expected.update(list(range(8)))
    assert_equal(module.gradients[0], expected.gradients[0])
    logged = trainer.callback_metrics
    assert float(logged["policy/loss"]) == pytest.approx(expected.losses[0]["policy"], abs=1e-6)
    assert float(logged["critic/loss"]) == pytest.approx(expected.losses[0]["critic"], abs=1e-6)
    rewards, values = [1.0, 0.25, 0.0, 0.0, 1.0, 0.5, 0.0, 1.0], [row["V"].item() for row in expected.rows]
    advantages = [r - v for r, v in zip(rewards, values, strict=True)]
    mean = sum(advantages) / 8
    assert float(logged["reward/mean"]) == pytest.approx(3.75 / 8)
    assert float(logged["critic/value_mean"]) == pytest.approx(sum(values) / 8, abs=1e-6)
    assert float(logged["critic/brier"]) == pytest.approx(sum(a * a for a in advantages) / 8, abs=1e-6)
    assert float(logged["advantage/std"]) == pytest.approx(
        math.sqrt(sum((a - mean) ** 2 for a in advantages) / 8), abs=1e-6
    )
    assert float(logged["advantage/positive_fraction"]) == sum(a > 0 for a in advantages) / 8
    for name in ("policy", "critic"):
        norm = math.sqrt(sum(float(g.square().sum()) for n, g in module.gradients[0].items() if n.startswith(name)))
        assert float(logged[f"{name}/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert trainer.global_step == 1


def test_later_updates_compare_with_log_probs_frozen_before_the_first():
    module, trainer = run(mini_batch_size=2)
    expected = ByHand()
    for start in range(0, 8, 2):
        expected.update([start, start + 1])
    assert len(module.gradients) == trainer.global_step == 4
    for ours, theirs in zip(module.gradients, expected.gradients, strict=True):
        assert_equal(
            ours, theirs, atol=1e-5
        )  # Qwen2's norms compute in float32, and AdamW magnifies their rounding
    hand = {f"{n}.{k}": p for n in ("policy", "critic") for k, p in getattr(expected, n).named_parameters()}
    assert_equal(weights(module), {k: p.detach() for k, p in hand.items()}, atol=1e-4)
    assert float(trainer.callback_metrics["policy/clip_fraction"]) > 0  # or the test would say little
    mean = sum(losses["policy"] for losses in expected.losses) / 4
    assert float(trainer.callback_metrics["policy/loss"]) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_the_cut_into_micro_batches_changes_nothing(mini_batch_size: int | None):
    runs = {
        budget: run(micro_batch_tokens=budget, mini_batch_size=mini_batch_size, kl_coef=0.3)
        for budget in (10_000, 30, 1)
    }
    backwards = {budget: module.backwards for budget, (module, _) in runs.items()}
    assert backwards == ({10_000: 1, 30: 3, 1: 8} if mini_batch_size is None else {10_000: 2, 30: 4, 1: 8})
    whole, trainer = runs[10_000]
    for budget in (30, 1):
        module, other = runs[budget]
        for ours, theirs in zip(module.gradients, whole.gradients, strict=True):
            assert_equal(ours, theirs)
        for name, value in trainer.callback_metrics.items():
            if not name.startswith(("time/", "verifier/")):
                assert float(other.callback_metrics[name]) == pytest.approx(float(value), abs=1e-5), name


def test_the_order_of_the_rows_changes_nothing():
    module, _ = run()
    shuffled = dict(sorted(CASES.items(), key=lambda item: item[0][::-1]))
    assert list(shuffled) != list(CASES)
    assert_equal(run(shuffled)[0].gradients[0], module.gradients[0])


def test_several_responses_to_one_prompt():
    cases = {"1 + 2 =": [("3 <eos>", 1.0), ("4 4 <eos>", 0.0)], "2 + 2 =": [("4 <eos>", 1.0), ("5", 0.5)]}
    module, _ = run(cases)
    expected = ByHand(cases)
    expected.update([0, 1, 2, 3])
    assert_equal(module.gradients[0], expected.gradients[0])


def test_a_response_without_a_verdict_counts_for_nothing():
    with_one: Any = CASES | {"5 5 5": [("a a a a <eos>", None)]}
    module, trainer = run(with_one)
    without, other = run()
    assert_equal(module.gradients[0], without.gradients[0])
    for name in ("policy/loss", "critic/loss", "policy/entropy", "reward/mean", "critic/brier", "advantage/std"):
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(other.callback_metrics[name]), abs=1e-6)
    assert trainer.callback_metrics["verifier/table_verifier/no_verdict"] == 1


def test_a_batch_without_any_verdict_moves_nothing():
    module, trainer = run({p: [(text, None) for text, _ in rows] for p, rows in CASES.items()})
    assert all(not gradient.any() for gradient in module.gradients[0].values())
    unknown = {n for n, value in trainer.callback_metrics.items() if not torch.isfinite(value)}
    assert unknown == {"reward/mean", "critic/value_mean", "advantage/std", "advantage/positive_fraction"}
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_shaping_reaches_the_advantage_and_not_the_critics_target():
    shaping = {prompt: float(i % 3) - 2.0 for i, prompt in enumerate(CASES)}
    module, trainer = run(shaping=shaping)
    expected = ByHand(shaping=shaping)
    expected.update(list(range(8)))
    assert_equal(module.gradients[0], expected.gradients[0])
    plain, _ = run()
    critic = {n: g for n, g in module.gradients[0].items() if n.startswith("critic")}
    assert_equal(critic, {n: plain.gradients[0][n] for n in critic})
    assert float(trainer.callback_metrics["reward/mean"]) == pytest.approx(3.75 / 8)


def test_no_verdict_of_a_shaping_verifier_is_no_verdict():
    first, *others = CASES
    shaping: Any = {first: None} | dict.fromkeys(others, 1.0)
    module, _ = run(shaping=shaping)
    cases = {prompt: CASES[prompt] for prompt in others}
    without, _ = run(cases, shaping=shaping)
    assert_equal(module.gradients[0], without.gradients[0])


def test_kl_to_the_reference():
    module, trainer = run(mini_batch_size=4, kl_coef=0.3)
    expected = ByHand(kl_coef=0.3)
    expected.update([0, 1, 2, 3])
    expected.update([4, 5, 6, 7])
    for ours, theirs in zip(module.gradients, expected.gradients, strict=True):
        assert_equal(ours, theirs)
    assert expected.losses[1]["kl"] > 0.01
    mean = (expected.losses[0]["kl"] + expected.losses[1]["kl"]) / 2
    assert float(trainer.callback_metrics["policy/kl"]) == pytest.approx(mean, abs=1e-5)
    fresh = make_policy().double()
    for name, parameter in module.reference.named_parameters():  # type: ignore[union-attr]
        assert torch.equal(parameter, dict(fresh.named_parameters())[name])
        assert not parameter.requires_grad


def test_no_reference_is_loaded_where_nothing_uses_one():
    module, trainer = run()
    assert module.reference is None
    assert "policy/kl" not in trainer.callback_metrics


class BySequence(ByHand):
    """One ratio for each response."""

    def __init__(self, normalize: str, against: str) -> None:
        self.normalize, self.against = normalize, against
        super().__init__()

    def policy_losses(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows:
            old = row["old"] if self.against == "behaviour" else self.log_probs(self.reference, row).detach()
            log_ratio = (self.log_probs(self.policy, row) - old).sum()
            ratio = torch.exp(log_ratio / (len(old) if self.normalize == "length" else 1))
            advantage = row["R"] - row["V"]
            loss = loss - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) / len(rows)
        return loss, torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("normalize", ["length", "none"])
@pytest.mark.parametrize("against", ["behaviour", "reference"])
def test_sequence_clip_objective_over_two_iterations(normalize: Any, against: Any):
    objective = SequenceClipObjective(normalize=normalize, against=against)
    module, _ = run(objective=objective, mini_batch_size=4, iterations=2)
    hand = BySequence(normalize, against)
    for _ in range(2):
        hand.begin_iteration()
        hand.update([0, 1, 2, 3])
        hand.update([4, 5, 6, 7])
    for ours, theirs in zip(module.gradients, hand.gradients, strict=True):
        assert_equal(ours, theirs)
    assert (module.reference is not None) == (against == "reference")


def test_the_samplers_log_probs_as_denominator():
    module, trainer = run(recompute_old_log_probs=False)
    hand = ByHand()
    for row in hand.rows:
        row["old"] = torch.full_like(row["old"], -1.0)  # what Recites says
    hand.update(list(range(8)))
    assert_equal(module.gradients[0], hand.gradients[0])
    gap = torch.cat([row["old"] + 1.0 for row in ByHand().rows]).abs().mean()
    assert float(trainer.callback_metrics["sampler/logprob_gap"]) == pytest.approx(float(gap), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "seq-mean-token-mean"])
def test_other_aggregations_do_not_depend_on_the_cut(aggregation: Any):
    gradients = [
        run(objective=TokenClipObjective(aggregation=aggregation), micro_batch_tokens=budget)[0].gradients[0]
        for budget in (10_000, 30, 1)
    ]
    assert_equal(gradients[1], gradients[0])
    assert_equal(gradients[2], gradients[0])


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
        def step_optimizer(self, modules: Any) -> Any:
            rates.append([group["lr"] for group in self.optimizers().param_groups])  # type: ignore[union-attr]
            return super().step_optimizer(modules)

    module = Rates(make_policy(), make_critic(), lr_schedule=schedule, warmup_updates=2, mini_batch_size=4, **FAST)
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
        "`advantage`=SequenceAdvantage needs a critic; set `model.critic`, for instance to "
        "sppo_lightning.models.PromptCritic."
    )


def test_metric_names_after_two_iterations():
    policy = make_policy()
    table: Any = type("Table", (dict,), {"__missing__": lambda self, key: float("3" in key[1])})()
    trainer = make_trainer(
        RolloutGeneration(Sampling(max_new_tokens=4), validation_greedy=True), TableVerifier(table), max_epochs=1
    )
    batches = [make_batch(policy, [f"{a} + {b} =" for b in range(4)], first_row=4 * a) for a in (1, 2)]
    module = SPPOModule(policy, make_critic(), mini_batch_size=2, kl_coef=0.1)
    trainer.fit(module, loader(*batches), loader(make_batch(policy, ["5 + 5 =", "6 + 6 ="])))
    assert trainer.global_step == 4
    groups = {
        "rollout": ["response_tokens_mean", "truncated_fraction", "tokens_per_second"],
        "reward": ["mean", "table_verifier"],
        "verifier/table_verifier": ["errors", "timeouts", "no_verdict", "seconds"],
        "policy": ["loss", "clip_fraction", "approx_kl", "entropy", "grad_norm", "kl"],
        "critic": [
            "loss",
            "value_mean",
            "brier",
            "brier_skill",
            "auroc",
            "calibration_error",
            "pearson",
            "grad_norm",
        ],
        "advantage": ["std", "positive_fraction"],
        "time": [f"{phase}{kind}" for phase in ("rollout", "verify", "update") for kind in ("", "_share")],
        "val/set0": ["avg@1", "pass@1", "greedy", "critic_pearson"],
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
    table: Any = type("Table", (dict,), {"__missing__": lambda self, key: float("3" in key[1])})()
    batches = [make_batch(policy, [f"{a} + {b} =" for b in range(4)], first_row=4 * a) for a in (1, 2)]
    module = SPPOModule(policy, make_critic(), mini_batch_size=2, kl_coef=0.1, **FAST)
    stages = RolloutGeneration(Sampling(max_new_tokens=4)), TableVerifier(table)
    trainer = make_trainer(*stages, precision=precision)
    before = weights(module)
    trainer.fit(module, loader(*batches), loader(make_batch(policy, ["5 + 5 =", "6 + 6 ="])))
    assert {p.dtype for p in module.parameters()} == {
        dtype
    }  # under mixed precision the master weights stay float32
    states = trainer.optimizers[0].state.values()
    assert {state["exp_avg"].dtype for state in states} == {dtype}
    assert all(float((p - before[n]).abs().max()) > 0 for n, p in weights(module).items() if p.ndim > 1)
    assert [n for n, value in trainer.callback_metrics.items() if not torch.isfinite(value)] == []
    assert float(trainer.callback_metrics["sampler/logprob_gap"]) < (1e-6 if precision == "64-true" else 0.1)


# ---------------------------------------------------------------- supervised fine-tuning


def demonstrations(policy: Any) -> PromptBatch:
    batch = make_batch(policy, list(CASES))
    texts = [rows[0][0].replace("<eos>", "").strip() for rows in CASES.values()]
    batch.prompts = [dataclasses.replace(p, demonstration=t) for p, t in zip(batch.prompts, texts, strict=True)]
    return batch


def sft(budget: int) -> tuple[dict[str, Tensor], Any, int]:
    found: list[dict[str, Tensor]] = []
    backwards: list[bool] = []

    class Recording(SFTModule):
        def accumulate(self, loss: Tensor, last: bool) -> None:
            backwards.append(last)
            super().accumulate(loss, last)

        def step_optimizer(self, modules: Any) -> Any:
            found.append({n: p.grad.clone() for n, p in self.named_parameters()})
            return super().step_optimizer(modules)

    module = Recording(make_policy(), micro_batch_tokens=budget)
    trainer = make_trainer()
    trainer.fit(module, loader(demonstrations(module.policy)))
    return found[0], trainer, len(backwards)


def test_sft_is_the_mean_cross_entropy_of_the_demonstrations_tokens():
    policy, losses = make_policy(), []
    for prompt, rows in CASES.items():
        ids = policy.tokenizer(prompt)["input_ids"]
        response = policy.tokenizer(rows[0][0].replace("<eos>", ""))["input_ids"] + [policy.tokenizer.eos_token_id]
        logits = policy.model(input_ids=torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters()}
    for budget, count in ((10_000, 1), (45, 3), (1, 8)):
        gradients, trainer, backwards = sft(budget)
        assert backwards == count
        assert_equal(gradients, expected)
        assert float(trainer.callback_metrics["sft/loss"]) == pytest.approx(loss.item(), abs=1e-5)
        assert trainer.global_step == 1


def test_sft_needs_demonstrations():
    policy = make_policy()
    with pytest.raises(InputError, match="Row 0 of the data set 'sums' has no demonstration to learn from"):
        make_trainer().fit(SFTModule(policy), loader(make_batch(policy, ["1 +"])))
