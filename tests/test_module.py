"""SPPOModule against a straightforward implementation of the same equations."""

import math
from typing import Any

import pytest
import torch
from by_hand import CASES, ByHand, BySequence, assert_equal, run, weights
from tiny import make_policy

from sppo_lightning.objectives import ImportanceWeightedObjective, SequenceClipObjective, TokenClipObjective


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
        # Qwen2's norms compute in float32, and AdamW magnifies their rounding
        assert_equal(ours, theirs, atol=1e-5)
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
            if not name.startswith(("time/", "memory/", "verifier/", "update/padding")):
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
    of_advantages = {f"advantage/{name}" for name in ("mean", "std", "positive_fraction", "nonzero_fraction")}
    assert unknown == {"reward/mean", "critic/value_mean", *of_advantages}
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


OBJECTIVES = {
    "per token": TokenClipObjective(),
    "sum": TokenClipObjective(aggregation="seq-mean-token-sum"),
    "constant length": TokenClipObjective(aggregation="seq-mean-token-sum", constant_length=9),
    "mean": TokenClipObjective(aggregation="seq-mean-token-mean"),
    "joint ratio": SequenceClipObjective(normalize="none"),
    "ratio by length": SequenceClipObjective(normalize="length"),
    "weight per token": ImportanceWeightedObjective(),
    "weight per response": ImportanceWeightedObjective(level="sequence"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_depends_on_the_cut_or_the_order(name: str):
    settings: dict[str, Any] = {"objective": OBJECTIVES[name], "recompute_old_log_probs": False}
    whole, trainer = run(**settings)
    assert whole.backwards == 1
    shuffled = dict(sorted(CASES.items(), key=lambda item: item[0][::-1]))
    others = [run(**settings, micro_batch_tokens=budget) for budget in (50, 12)] + [run(shuffled, **settings)]
    assert [module.backwards for module, _ in others] == [2, 7, 1]
    for module, other in others:
        assert_equal(module.gradients[0], whole.gradients[0])
        for metric in ("policy/loss", "critic/loss", "policy/clip_fraction", "policy/grad_norm"):
            expected = float(trainer.callback_metrics[metric])
            assert float(other.callback_metrics[metric]) == pytest.approx(expected, abs=1e-6), metric
