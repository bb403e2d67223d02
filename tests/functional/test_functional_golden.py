import json
import math
from pathlib import Path

import pytest
import torch

from sppo_lightning import functional as math_of

CASES = json.loads((Path(__file__).parents[1] / "golden" / "objectives.json").read_text())


def golden_advantage(name, inputs, options):
    mask = inputs.pop("mask")
    advantages = getattr(math_of, name)(**inputs, **options)
    actual = {"token_advantages": advantages[:, None] * mask}
    return actual | {"returns": inputs["rewards"]} if name == "sequence_advantage" else actual


def golden_token_clip(inputs, options):
    aggregation = options.pop("aggregation")
    logp = inputs["logp"].requires_grad_()
    losses, stats = math_of.token_clip_objective(**inputs, **options)
    loss = math_of.aggregate(losses, inputs["mask"], aggregation)
    loss.backward()
    return {"loss": loss.detach(), "grad_logp": logp.grad, **stats}


def golden_sequence_clip(inputs, options, normalize):
    if "token_advantages" in inputs:  # the same for every token, and each first token is a response token
        inputs["advantages"] = inputs.pop("token_advantages")[:, 0]
    logp = inputs["logp"].requires_grad_()
    losses, stats = math_of.sequence_clip_objective(**inputs, **options, normalize=normalize)
    losses.mean().backward()
    # With A = −1 and nothing clipped, the loss of a sequence is its ratio.
    flat = inputs | {"advantages": -torch.ones_like(inputs["advantages"])}
    ratio, _ = math_of.sequence_clip_objective(**flat, clip_low=1.0, clip_high=math.inf, normalize=normalize)
    return {"loss": losses.mean().detach(), "grad_logp": logp.grad, "ratio": ratio.detach(), **stats}


def golden_actual(name, inputs, options):
    if name == "critic_bce":
        return {"loss": math_of.critic_loss(**inputs)}
    if name == "gae":
        return dict(zip(("token_advantages", "returns"), math_of.gae(**inputs, **options), strict=True))
    if name == "kl_penalty":
        return {"token_kl": math_of.kl_penalty(**inputs, **options)}
    if name == "token_clip_objective":
        return golden_token_clip(inputs, options)
    if name.startswith("sequence_clip_objective"):
        normalize = {"joint": "none", "length_normalised": "length"}[name[len("sequence_clip_objective_") :]]
        return golden_sequence_clip(inputs, options, normalize)
    return golden_advantage(name, inputs, options)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['name']}-{c['seed']}-{c['options']}")
def test_agrees_with_the_authors_implementation(case):
    inputs = {
        key: torch.tensor(value, dtype=torch.int64 if key == "groups" else torch.float64)
        for key, value in case["inputs"].items()
    }
    actual = golden_actual(case["name"], inputs, dict(case["options"]))
    assert case["expected"]
    for key, expected in case["expected"].items():
        torch.testing.assert_close(actual[key], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
