"""What is asked of vLLM and made of its answers, without a vLLM."""

import math
import sys
from typing import Any

import pytest

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.engines import NCCLTransfer, Sampling, VLLMEngine
from sppo_lightning.engines.vllm_requests import check_answer, request_settings, seed_of
from sppo_lightning.errors import InputError


def test_an_engine_without_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        InputError, match=r"^`engine`=VLLMEngine needs vLLM, .* pip install 'sppo-lightning\[vllm\]'"
    ):
        VLLMEngine()


def test_a_transfer_without_vllm_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        InputError, match=r"^`transfer`=NCCLTransfer needs vLLM .* pip install 'sppo-lightning\[vll"
    ):
        NCCLTransfer()


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, math.nan])
def test_a_share_of_the_memory_that_is_none(share: float):
    with pytest.raises(InputError, match=f"^`gpu_memory_utilization`={share} of VLLMEngine must be above 0 and"):
        VLLMEngine(share)


def test_a_seed_is_the_samples_own_whoever_asks_for_it():
    prompt = Prompt("a", "", "sums", 4)
    first, behind = PromptBatch([prompt], [[5]], [2]), PromptBatch([prompt] * 2, [[5]] * 2, [2, 2], [1, 3])
    expected = [seed_of(7, first, (0, sample)) for sample in range(5)]
    assert len(set(expected)) == 5
    assert [seed_of(7, behind, (0, 0)), seed_of(7, behind, (1, 0)), seed_of(7, behind, (1, 1))] == [
        expected[1],
        expected[3],
        expected[4],
    ]


def test_settings_have_vllms_names():
    settings = request_settings(Sampling(0.7, 9, 4, 0.8, 5, 0.1, ("x",)), [1, 3])
    assert settings["stop_token_ids"] == [1, 3]
    assert {name: settings[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop")} == {
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 5,
        "min_p": 0.1,
        "stop": ["x"],
    }


@pytest.mark.parametrize(
    ("ids", "log_probs", "reason", "sentence"),
    [
        ([], [], "stop", "it gives 0 tokens"),
        ([3, 4], [-0.5], "stop", "it gives 2 tokens and log-probabilities \\[-0.5\\]"),
        ([3], [-math.inf], "length", "it gives 1 tokens and log-probabilities \\[-inf\\]"),
        ([3], [-0.5], "abort", "it ended a response for the reason 'abort'"),
        ([3], [-0.5], None, "it ended a response for the reason None"),
    ],
)
def test_an_answer_that_is_not_whole(ids: list[int], log_probs: list[float], reason: Any, sentence: str):
    with pytest.raises(RuntimeError, match=f"^{sentence}"):
        check_answer("it", ids, log_probs, reason)
