"""What holds for every function: gradients, dtypes, untouched inputs, masked garbage and additivity."""

import math
from functools import partial

import pytest
import torch

from sppo_lightning import functional as math_of

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
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


# Each maps the inputs and a mask to one tensor, or to a tuple of them.
TOKEN_OBJECTIVES = {
    mode: partial(
        lambda x, mask, mode: math_of.aggregate(
            math_of.token_clip_objective(x["logp"], x["old_logp"], x["token_advantages"], mask)[0], mask, mode
        ),
        mode=mode,
    )
    for mode in AGGREGATIONS
}
SEQUENCE_OBJECTIVES = {
    normalize: partial(
        lambda x, mask, normalize: math_of.sequence_clip_objective(
            x["logp"], x["old_logp"], x["advantages"], mask, normalize=normalize
        )[0].sum(),
        normalize=normalize,
    )
    for normalize in ("none", "length")
}
KL = {
    estimator: partial(
        lambda x, mask, estimator: math_of.aggregate(
            math_of.kl_penalty(x["logp"], x["old_logp"], estimator), mask, "token-mean"
        ),
        estimator=estimator,
    )
    for estimator in ("k1", "k2", "k3")
}
MASKED = {
    **TOKEN_OBJECTIVES,
    **SEQUENCE_OBJECTIVES,
    **KL,
    "gae": lambda x, mask: math_of.gae(x["token_advantages"], x["logp"], mask, 0.9, 0.8),
}
PER_SEQUENCE = {
    "sequence_advantage": lambda x, _: math_of.sequence_advantage(x["rewards"], x["value_logits"]),
    "critic_loss": lambda x, _: math_of.critic_loss(x["value_logits"], x["rewards"]),
    "group_advantage": lambda x, _: math_of.group_advantage(x["rewards"], GROUPS),
    "leave_one_out_advantage": lambda x, _: math_of.leave_one_out_advantage(x["rewards"], GROUPS),
    "greedy_baseline_advantage": lambda x, _: math_of.greedy_baseline_advantage(x["rewards"], x["advantages"]),
}
ALL = {**MASKED, **PER_SEQUENCE}


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    inputs = make_inputs()
    logp, value_logits = inputs["logp"].requires_grad_(), inputs["value_logits"].requires_grad_()
    rewards = inputs["rewards"].requires_grad_(name != "critic_loss")
    wanted = {"logp": logp, "value_logits": value_logits, "rewards": rewards}
    used = {k: v for k, v in wanted.items() if v.requires_grad}
    assert torch.autograd.gradcheck(
        lambda *values: ALL[name](inputs | dict(zip(used, values, strict=True)), MASK), tuple(used.values())
    )


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
        arguments = x["logp"], x["old_logp"]
        stats = math_of.token_clip_objective(*arguments, x["token_advantages"], MASK)[1]
        stats |= math_of.sequence_clip_objective(*arguments, x["advantages"], MASK)[1]
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


@pytest.mark.parametrize("normalize", [None, "none", "length"])
def test_stats_average_over_micro_batches_by_their_tokens(normalize):
    x = make_inputs()

    def stats(rows):
        arguments = x["logp"][rows], x["old_logp"][rows]
        if normalize is None:
            return math_of.token_clip_objective(*arguments, x["token_advantages"][rows], MASK[rows])[1]
        return math_of.sequence_clip_objective(*arguments, x["advantages"][rows], MASK[rows], normalize=normalize)[
            1
        ]

    whole, parts = stats(slice(None)), [slice(1), slice(1, 3), slice(3, 4), slice(4, 5)]
    for key, value in whole.items():
        weighted = sum(stats(rows)[key] * MASK[rows].sum() for rows in parts) / MASK.sum()
        torch.testing.assert_close(weighted, value, rtol=0, atol=1e-8)
