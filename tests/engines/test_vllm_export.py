"""A policy that was trained and exported, served by a real vLLM: it says what it says here."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from contract import TEXTS, ids, sample
from tiny import AnyDigit, loader, make_batch, make_critic, make_policy, make_trainer
from transformers import AutoTokenizer
from vllm_process import VLLMProcess, served_policy

from sppo_lightning import SPPOModule
from sppo_lightning.callbacks import HFExport, RolloutGeneration
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.models import LoRA
from sppo_lightning.optim import GroupOptimizer

pytestmark = pytest.mark.vllm


class Exported:
    """The folder as it is, with none of the settings that sampling for training needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, policy: Any) -> str:
        return f"VLLM_NO_USAGE_STATS=1 python -m vllm.entrypoints.openai.api_server --model {self.folder}"


def complete(url: str, folder: Path, prompt: list[int], **settings: Any) -> list[int]:
    body = {"model": str(folder), "prompt": prompt, "max_tokens": 12, "return_token_ids": True} | settings
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora merged"])
def test_greedy_tokens_are_the_same(tmp_path: Path, lora: bool):
    policy = make_policy(hidden_size=64, max_tokens=512, lora=LoRA(rank=4) if lora else None)
    module = SPPOModule(policy, make_critic(zero=True), policy_optimizer=GroupOptimizer(lr=0.003))
    untrained = ids(sample(HFEngine(), served_policy(), temperature=0.0))
    batches = [make_batch(policy, TEXTS, first_row=4 * i) for i in range(3)]
    folder = tmp_path / "model"
    generation = RolloutGeneration(Sampling(max_new_tokens=12, samples_per_prompt=4))
    make_trainer(generation, AnyDigit(), HFExport(str(folder))).fit(module, loader(*batches))
    expected = ids(sample(HFEngine(), policy, temperature=0.0))
    assert expected != untrained
    server = VLLMProcess(Exported(folder), tmp_path)  # type: ignore[arg-type]
    try:
        server.wait()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
        found = [complete(server.url, folder, prompt, temperature=0) for prompt in prompts]
    finally:
        server.kill()
    assert found == expected
