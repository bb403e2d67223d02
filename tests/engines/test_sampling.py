"""One decoding step: temperature, truncation, noise, and the settings that are refused."""

import math
from typing import Any

import pytest
import torch
from tiny import make_batch, make_policy

from sppo_lightning.engines import Sampling
from sppo_lightning.engines.sampling import choose, token_noise, truncate
from sppo_lightning.errors import InputError

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 2.5, -3.0, 1.0]])


def draw(count: int, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    uniforms = (torch.arange(count) + 0.5) / count  # every share of [0, 1) once
    return choose(LOGITS.expand(count, -1), uniforms, sampling)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float):
    tokens, log_probs = draw(20_000, Sampling(temperature=temperature))
    weights = [math.exp(x / temperature) for x in LOGITS[0].tolist()]
    shares = [w / sum(weights) for w in weights]
    counts = torch.bincount(tokens, minlength=6) / 20_000
    torch.testing.assert_close(counts, torch.tensor(shares), atol=2e-4, rtol=0)
    torch.testing.assert_close(log_probs, torch.tensor(shares).log()[tokens], atol=1e-5, rtol=1e-5)


def test_the_noise_is_uniform():
    prompt = make_batch(make_policy(), ["1"]).prompts[0]
    noise = torch.from_numpy(token_noise(0, prompt, 0, 0, 50_000))
    assert torch.histc(noise, 10, 0, 1).sub(5_000).abs().max() < 5 * math.sqrt(4_500)
    assert abs(float((noise[1:] - 0.5) @ (noise[:-1] - 0.5))) / 50_000 < 5 / 12 / math.sqrt(50_000)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [3]),
        ({"top_k": 2}, [0, 3]),
        ({"top_k": 0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.1}, [3]),  # the most likely token stays even where it alone exceeds the mass
        ({"top_p": 0.8}, [0, 3]),  # 0.498 + 0.302 = 0.8003
        ({"top_p": 0.85}, [0, 3, 5]),  # 0.8003 + 0.1111
        ({"top_p": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 2, "top_p": 0.6}, [3]),  # of the two that are left, the first has 0.62
        ({"min_p": 0.5}, [0, 3]),  # e^-0.5 = 0.61 and e^-1.5 = 0.22 of the first
        ({"min_p": 0.2}, [0, 3, 5]),
        ({"min_p": 0.7}, [3]),
        ({"min_p": 0.2, "top_p": 0.8}, [0, 3]),  # of the three that are left, the two have 0.88
    ],
)
def test_top_k_and_top_p(settings: dict[str, Any], kept: list[int]):
    tokens, log_probs = draw(20_000, Sampling(**settings))
    assert sorted(set(tokens.tolist())) == kept
    total = sum(math.exp(LOGITS[0, i]) for i in kept)
    expected = LOGITS[0, tokens] - math.log(total)  # of the distribution that was sampled from
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_a_row_of_nan_has_a_token_that_says_so_and_disturbs_no_other(settings: dict[str, Any]):
    logits = torch.tensor([[0.0, 1.0, 2.0], [math.nan] * 3, [2.0, 1.0, 0.0]])
    uniforms, sampling = torch.tensor([0.3, 0.3, 0.3]), Sampling(**settings)
    tokens, log_probs = choose(logits, uniforms, sampling)
    assert 0 <= tokens[1] < 3
    assert log_probs.isnan().tolist() == [False, True, False]
    alone = choose(logits[[0, 2]], uniforms[[0, 2]], sampling)
    assert torch.equal(tokens[[0, 2]], alone[0])
    assert torch.equal(log_probs[[0, 2]], alone[1])


def test_extreme_noise_never_draws_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    uniforms = torch.tensor([0.0, 1 - 2**-24, 0.5])
    assert choose(logits, uniforms, Sampling())[0].tolist() == [1, 3, 1]
    kept = truncate(torch.tensor([[1.0, 0.0, -1.0]]), Sampling(top_k=2))
    assert kept.tolist() == [[1.0, 0.0, -math.inf]]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"temperature": -0.1},
            "`temperature`=-0.1 of the sampling settings cannot be used; it must be 0 (greedy), or from 1e-4 to 1e4.",
        ),
        (
            {"max_new_tokens": 0},
            "`max_new_tokens`=0 of the sampling settings cannot be used; it must be from 1 to 2**24.",
        ),
        (
            {"samples_per_prompt": 0},
            "`samples_per_prompt`=0 of the sampling settings cannot be used; it must be from 1 to 2**16.",
        ),
        ({"top_p": 0.0}, "`top_p`=0.0 of the sampling settings cannot be used; it must be above 0 and at most 1."),
        ({"top_p": 1.1}, "`top_p`=1.1 of the sampling settings cannot be used; it must be above 0 and at most 1."),
        (
            {"min_p": 1.0},
            "`min_p`=1.0 of the sampling settings cannot be used; it must be 0 (keep all) or more, and below 1.",
        ),
        (
            {"stop": (";", "")},
            "`stop`=(';', '') of the sampling settings cannot be used; it must be strings that are not empty.",
        ),
        ({"top_k": -1}, "`top_k`=-1 of the sampling settings cannot be used; it must be 0 (keep all) or more."),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], sentence: str):
    with pytest.raises(InputError) as raised:
        Sampling(**settings)
    assert str(raised.value) == sentence
