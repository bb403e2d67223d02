import math

import pytest
import torch
from torch import Tensor

from sppo_lightning.models import log_probs as module
from sppo_lightning.models.log_probs import selected_log_probs, selected_log_probs_of

FORMS = [
    {},
    {"temperature": 0.6},
    {"scale": 0.25},
    {"softcap": 2.0},
    {"temperature": 1.7, "scale": 3.0, "softcap": 5.0},
]


def naive(hidden, weight, targets, bias=None, temperature=1.0, scale=1.0, softcap=None):
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = torch.distributions.Categorical(logits=logits.to(torch.float64) / temperature)
    return distribution.log_prob(targets), distribution.entropy()


def make_inputs(rows=7, width=5, vocabulary=11, dtype=torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return draw(rows, width), draw(vocabulary, width), draw(vocabulary), targets


def gradients(log_probs, leaves):
    upstream = torch.linspace(-1, 2, len(log_probs), dtype=log_probs.dtype)
    return torch.autograd.grad(log_probs, leaves, upstream)


def test_log_probs_and_entropy_by_hand():
    # logits (0, ln 3): probabilities 1/4 and 3/4; at temperature 1/2 the logits double: 1/10 and 9/10
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]])
    for temperature, p in ((1.0, 0.75), (0.5, 0.9)):
        log_probs, entropy = selected_log_probs(hidden, weight, torch.tensor([0, 1]), temperature=temperature)
        expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
        torch.testing.assert_close(log_probs, torch.tensor([math.log(1 - p), math.log(p)]))
        torch.testing.assert_close(entropy, torch.tensor([expected, expected]))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_naive_computation(form, chunk_size, with_bias):
    hidden, weight, bias, targets = make_inputs()
    form = form | ({"bias": bias} if with_bias else {})
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    expected, expected_entropy = naive(hidden, weight, targets, **form)
    actual, entropy = selected_log_probs(hidden, weight, targets, chunk_size=chunk_size, **form)
    assert not entropy.requires_grad
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=0, atol=1e-10)
    for ours, theirs in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradcheck(form, chunk_size):
    hidden, weight, bias, targets = make_inputs(rows=5, width=3, vocabulary=4)
    assert torch.autograd.gradcheck(
        lambda h, w, b: selected_log_probs(h, w, targets, bias=b, chunk_size=chunk_size, **form)[0],
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_inputs_are_unchanged_and_backward_runs_twice(chunk_size):
    hidden, weight, bias, targets = leaves = make_inputs()
    before = [x.detach().clone() for x in leaves]
    log_probs, _ = selected_log_probs(hidden, weight, targets, bias=bias, chunk_size=chunk_size)
    once = torch.autograd.grad(log_probs.sum(), (hidden, weight, bias), retain_graph=True)
    twice = torch.autograd.grad(log_probs.sum(), (hidden, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    hidden, weight, _, targets = make_inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    selected_log_probs(hidden, weight, targets, chunk_size=3)[0].sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


def test_without_rows_the_weight_still_gets_a_gradient_of_zero():
    weight, bias = torch.randn(6, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    hidden = torch.zeros(0, 3, requires_grad=True)
    log_probs, entropy = selected_log_probs(hidden, weight, torch.zeros(0, dtype=torch.long), bias=bias)
    log_probs.sum().backward()
    assert log_probs.shape == entropy.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(6, 3))
    assert torch.equal(bias.grad, torch.zeros(6))
    assert hidden.grad.shape == (0, 3)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_stay_finite(chunk_size, size):
    # row 0 is certain of its target, row 1 certain of another
    hidden = torch.tensor([[size], [-size]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    log_probs, entropy = selected_log_probs(hidden, weight, torch.tensor([0, 0]), chunk_size=chunk_size)
    log_probs.sum().backward()
    torch.testing.assert_close(log_probs.detach(), torch.tensor([0.0, -2 * size]))
    assert torch.equal(entropy, torch.zeros(2))
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [2.0]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[-size], [size]]))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_bfloat16_inputs_give_float32_log_probs(chunk_size):
    hidden, weight, _, targets = make_inputs(rows=16, dtype=torch.bfloat16)
    log_probs, entropy = selected_log_probs(hidden, weight, targets, chunk_size=chunk_size)
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected, expected_entropy = naive(hidden, weight, targets)  # its logits are rounded alike
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-5)
    ours, theirs = gradients(log_probs, (hidden, weight)), gradients(expected, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(chunk_size):
    hidden, weight, bias, targets = make_inputs(rows=16, dtype=torch.float32)
    leaves = (hidden, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = naive(hidden, weight, targets, bias=bias)
        log_probs, _ = selected_log_probs(hidden, weight, targets, bias=bias, chunk_size=chunk_size)
        inside = torch.autograd.grad(log_probs.sum(), leaves, retain_graph=True)
    outside = torch.autograd.grad(log_probs.sum(), leaves, retain_graph=True)
    torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=1e-5)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(log_probs, leaves), gradients(expected, leaves), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_inside_autocast_does_not_round_a_wider_forward(chunk_size, dtype):
    hidden, weight, bias, targets = make_inputs(rows=16, dtype=dtype)
    leaves = (hidden, weight, bias)
    log_probs, _ = selected_log_probs(hidden, weight, targets, bias=bias, chunk_size=chunk_size)
    outside = torch.autograd.grad(log_probs.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(log_probs.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_sums_over_many_bfloat16_chunks_do_not_lose_the_later_ones():
    # Each of 1,000 rows adds 1/2 to the gradient of the first weight; bfloat16 sums would stop at 128.
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    log_probs, _ = selected_log_probs(hidden, weight, torch.zeros(1000, dtype=torch.long), chunk_size=1)
    log_probs.sum().backward()
    assert weight.grad.tolist() == [[500.0], [-500.0]]


def test_default_chunks_fit_the_budget(monkeypatch):
    seen = []
    write = module._Logits.write

    def spy(self, out, *rest):
        seen.append(len(out))
        write(self, out, *rest)

    monkeypatch.setattr(module._Logits, "write", spy)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 11 * 3)  # three rows of 11 float32 logits
    hidden, weight, _, targets = make_inputs(dtype=torch.float32)
    selected_log_probs(hidden, weight, targets)[0].sum().backward()
    assert seen == [3, 3, 1] * 2  # forward, backward
    seen.clear()
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    selected_log_probs(hidden, weight, targets)
    assert seen == [1] * 7


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("rows", [0, 7])
def test_logits_of_any_function(rows, chunk_size):
    hidden, weight, bias, targets = make_inputs(rows=rows)
    given = {"temperature": 0.7, "chunk_size": chunk_size}
    plain = selected_log_probs(hidden, weight, targets, bias=bias, **given)
    calls = []

    def logits(chunk):
        calls.append(len(chunk))
        return chunk @ weight.T + bias

    any_function = selected_log_probs_of(logits, hidden, targets, width=len(weight), **given)
    assert not any_function[1].requires_grad
    assert max(calls) <= (chunk_size or rows)
    for a, b in zip(any_function, plain, strict=True):
        torch.testing.assert_close(a, b)
    both = (torch.autograd.grad(out[0].square().sum(), (hidden, weight, bias)) for out in (any_function, plain))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 2 * max(1, math.ceil(rows / (chunk_size or max(1, rows))))  # once more in backward


def test_a_token_that_cannot_be_has_no_part_in_the_entropy():
    hidden = torch.zeros(2, 1, requires_grad=True)

    def logits(chunk):
        return chunk + torch.tensor([0.0, 0.0, -torch.inf])

    log_probs, entropy = selected_log_probs_of(logits, hidden, torch.tensor([0, 1]), width=3)
    torch.testing.assert_close(torch.stack([-log_probs, entropy]), torch.full((2, 2), math.log(2)))
    log_probs.sum().backward()
    assert hidden.grad.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("temperature", math.nan), ("chunk_size", 0)])
def test_settings_that_cannot_be_are_named(name, value):
    hidden, weight, _, targets = make_inputs()
    with pytest.raises(ValueError, match="is not above 0") as error:
        selected_log_probs(hidden, weight, targets, **{name: value})
    assert str(error.value) == f"`{name}`={value} is not above 0; use 1 or more."
