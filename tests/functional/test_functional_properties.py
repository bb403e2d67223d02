"""What holds for every function: gradients, dtypes, untouched inputs, masked garbage and additivity."""

import math
from functools import partial

import pytest
import torch
from vectors import AGGREGATIONS

from sppo_lightning import functional as math_of

MASK = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
GROUPS = torch.tensor([0, 1, 0, 1, 1])


def make_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    old_logp = draw(5, 5) - 2
    return {
        "logp": old_logp + 0.5 * draw(5, 5),
        "old_logp": old_logp,
        "token_advantages": draw(5, 5),
        "advantages": draw(5),
        "rewards": draw(5).sigmoid(),
        "value_logits": draw(5),
    }


OBJECTIVES = {  # the function, and which of the inputs are its advantages
    "token_clip": (math_of.token_clip_objective, "token_advantages"),
    **{
        f"sequence_clip {normalize}": (
            partial(math_of.sequence_clip_objective, normalize=normalize),
            "advantages",
        )
        for normalize in ("none", "length")
    },
    **{
        f"importance_weighted {level}": (
            partial(math_of.importance_weighted_objective, level=level),
            "token_advantages",
        )
        for level in ("token", "sequence")
    },
}

# Each maps the inputs and a mask to one tensor, or to a tuple of them.
CLIPS = [{}, {"clip_low": 0.1, "clip_high": 0.5}, {"clip_low": 1.0, "clip_high": math.inf}]


def token_clip(x, mask, mode=None, **options):
    losses, _ = math_of.token_clip_objective(x["logp"], x["old_logp"], x["token_advantages"], mask, **options)
    return losses if mode is None else math_of.aggregate(losses, mask, mode)


def sequence_clip(x, mask, **options):
    return math_of.sequence_clip_objective(x["logp"], x["old_logp"], x["advantages"], mask, **options)[0]


def importance_weighted(x, mask, **options):
    return math_of.importance_weighted_objective(x["logp"], x["old_logp"], x["token_advantages"], mask, **options)[
        0
    ]


def value_loss(x, mask, clip):
    return math_of.clipped_value_loss(x["logp"], x["old_logp"], x["token_advantages"] - 2, mask, clip)


def kl(x, mask, estimator):
    return math_of.aggregate(math_of.kl_penalty(x["logp"], x["old_logp"], estimator), mask, "token-mean")


SMOOTH = {  # what is differentiable in log-probabilities, `token_advantages` and `advantages`
    **{mode: partial(token_clip, mode=mode) for mode in AGGREGATIONS},
    **{
        f"token_clip {clip} {dual_clip}": partial(token_clip, dual_clip=dual_clip, **clip)
        for clip in CLIPS
        for dual_clip in (1.1, 3.0)
    },
    **{
        f"sequence_clip {normalize} {clip}": partial(sequence_clip, normalize=normalize, **clip)
        for clip in CLIPS
        for normalize in ("none", "length")
    },
    **{f"clipped_value_loss {clip}": partial(value_loss, clip=clip) for clip in (0.1, 0.5, math.inf)},
    **{estimator: partial(kl, estimator=estimator) for estimator in ("k1", "k2", "k3")},
    "gae": lambda x, mask: math_of.gae(x["token_advantages"], x["logp"], mask, 0.9, 0.8),
    "gae, not whitened": lambda x, mask: math_of.gae(x["token_advantages"], x["logp"], mask, 0.9, 0.3, False),
    "whiten_tokens": lambda x, mask: math_of.whiten_tokens(x["logp"], mask),
    "last_token_rewards": lambda x, mask: math_of.last_token_rewards(x["advantages"], mask, x["logp"]),
    "blend_advantages": lambda x, mask: math_of.blend_advantages(x["advantages"], x["logp"], mask, 0.3),
}
WEIGHTED = {
    "token": partial(importance_weighted, min_weight=0.9, max_weight=1.1),
    "token, from above alone": importance_weighted,
    "sequence": partial(importance_weighted, min_weight=0.9, max_weight=1.1, level="sequence"),
    "sequence, no bound": partial(importance_weighted, max_weight=math.inf, level="sequence"),
}
MASKED = SMOOTH | WEIGHTED
PER_SEQUENCE = {
    "sequence_advantage": lambda x, _: math_of.sequence_advantage(x["rewards"], x["value_logits"]),
    "critic_loss": lambda x, _: math_of.critic_loss(x["value_logits"], x["rewards"]),
    "critic_loss, denominator": lambda x, _: math_of.critic_loss(x["value_logits"], x["rewards"], 7),
    "group_advantage": lambda x, _: math_of.group_advantage(x["rewards"], GROUPS),
    "leave_one_out_advantage": lambda x, _: math_of.leave_one_out_advantage(x["rewards"], GROUPS),
    "greedy_baseline_advantage": lambda x, _: math_of.greedy_baseline_advantage(x["rewards"], x["advantages"]),
}
ALL = {**MASKED, **PER_SEQUENCE}


@pytest.mark.parametrize("name", [*SMOOTH, *PER_SEQUENCE])
def test_gradients(name):
    inputs = make_inputs()
    keys = ["value_logits", "rewards"] if name in PER_SEQUENCE else ["logp", "token_advantages", "advantages"]
    if name.startswith("critic_loss"):
        keys.remove("rewards")  # targets, which the check would push past 1
    leaves = tuple(inputs[key].requires_grad_() for key in keys)
    assert torch.autograd.gradcheck(
        lambda *values: ALL[name](inputs | dict(zip(keys, values, strict=True)), MASK), leaves
    )


@pytest.mark.parametrize("name", WEIGHTED)
def test_the_gradient_of_weighted_losses_is_the_weight_times_the_advantage(name):
    # Some weights are truncated from below, some from above, some not at all: every token keeps its gradient.
    inputs = make_inputs()
    logp = inputs["logp"].requires_grad_()
    options = WEIGHTED[name].keywords if isinstance(WEIGHTED[name], partial) else {}
    WEIGHTED[name](inputs, MASK).sum().backward()
    log_ratio = (logp - inputs["old_logp"]).detach() * MASK
    if options.get("level") == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True)
    weight = log_ratio.exp().clip(options.get("min_weight", 0.0), options.get("max_weight", 1.2))
    torch.testing.assert_close(logp.grad, -weight * inputs["token_advantages"] * MASK, rtol=0, atol=1e-15)
    assert (logp.grad[MASK == 1] != 0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_inputs_are_unchanged(name, dtype):
    inputs = make_inputs(dtype)
    before = {key: value.clone() for key, value in inputs.items()}
    outputs = ALL[name](inputs, MASK)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert output.dtype == dtype
    for key, value in inputs.items():
        assert torch.equal(value, before[key]), key


def test_stats_keep_the_dtype():
    for dtype in (torch.float32, torch.float64):
        x = make_inputs(dtype)
        for function, advantages in OBJECTIVES.values():
            stats = function(x["logp"], x["old_logp"], x[advantages], MASK)[1]
            assert {value.dtype for value in stats.values()} == {dtype}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_garbage_reaches_no_value_and_no_gradient(name, garbage):
    def outputs_and_gradients(inputs):
        leaves = [inputs[key].requires_grad_() for key in ("logp", "old_logp", "token_advantages")]
        outputs = MASKED[name](inputs, MASK)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.sum() for output in outputs).backward()
        return [output.detach() for output in outputs], [leaf.grad for leaf in leaves]

    clean, dirty = make_inputs(), make_inputs()
    for key in ("logp", "old_logp", "token_advantages"):
        clean[key][MASK == 0] = 0.0
        dirty[key][MASK == 0] = garbage
    dirty["advantages"][4] = garbage  # of the sequence without tokens
    values, gradients = outputs_and_gradients(clean)
    dirty_values, dirty_gradients = outputs_and_gradients(dirty)
    for expected, actual in zip(values, dirty_values, strict=True):
        assert actual.isfinite().all()
        assert torch.equal(actual, expected)
    for expected, actual in zip(gradients, dirty_gradients, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert torch.equal(actual[MASK == 1], expected[MASK == 1])
            assert actual[MASK == 0].abs().sum().item() == 0.0


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[4], [3, 0], [1, 2]], [[0], [1], [2], [3], [4]]])
def test_losses_and_gradients_of_micro_batches_add_up(mode, parts):
    x = make_inputs()
    logp = x["logp"].requires_grad_()

    def losses(rows):
        return math_of.token_clip_objective(
            logp[rows], x["old_logp"][rows], x["token_advantages"][rows], MASK[rows]
        )[0]

    whole = math_of.aggregate(losses(slice(None)), MASK, mode)
    (gradient,) = torch.autograd.grad(whole, logp)
    count = MASK.sum() if mode == "token-mean" else (MASK.sum(1) > 0).sum()
    pieces = [math_of.aggregate(losses(rows), MASK[rows], mode, denominator=count) for rows in parts]
    sum(pieces).backward()
    torch.testing.assert_close(sum(pieces), whole, rtol=0, atol=1e-14)
    torch.testing.assert_close(logp.grad, gradient, rtol=0, atol=1e-14)


def test_critic_losses_of_micro_batches_add_up():
    x = make_inputs()
    logits, rewards = x["value_logits"], x["rewards"]
    pieces = [math_of.critic_loss(logits[s], rewards[s], denominator=5) for s in (slice(2), slice(2, 5))]
    torch.testing.assert_close(sum(pieces), math_of.critic_loss(logits, rewards), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stats_average_over_micro_batches_by_their_tokens(name):
    x = make_inputs()
    function, advantages = OBJECTIVES[name]

    def stats(rows):
        return function(x["logp"][rows], x["old_logp"][rows], x[advantages][rows], MASK[rows])[1]

    whole, parts = stats(slice(None)), [slice(1), slice(1, 3), slice(3, 4), slice(4, 5)]
    for key, value in whole.items():
        weighted = sum(stats(rows)[key] * MASK[rows].sum() for rows in parts) / MASK.sum()
        torch.testing.assert_close(weighted, value, rtol=0, atol=1e-8)
