import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts
from sppo_lightning.callbacks.completion_writer import CompletionWriter
from sppo_lightning.callbacks.exact_match import ExactMatch
from sppo_lightning.callbacks.verifier import Verifier
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import Stage


class Recites(Stage):
    """Answers each prompt with its own text; answers longer than 3 characters are cut off."""

    provides = frozenset({"rollouts"})

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        n = len(batch)
        lengths = [min(len(prompt.text), 3) for prompt in batch.prompts]
        mask = torch.tensor([[float(t < length) for t in range(3)] for length in lengths]).reshape(n, 3)
        batch.rollouts = Rollouts(
            prompts=batch.prompts,
            prompt_index=torch.arange(n),
            prompt_ids=torch.zeros(n, 1, dtype=torch.long),
            prompt_mask=torch.ones(n, 1),
            response_ids=torch.zeros(n, 3, dtype=torch.long),
            response_mask=mask,
            sampled_log_probs=torch.zeros(n, 3),
            responses=[prompt.text[:3] for prompt in batch.prompts],
            finish_reasons=["length" if len(prompt.text) > 3 else "stop" for prompt in batch.prompts],
            temperature=1.0,
            policy_versions=torch.zeros(n, dtype=torch.long),
        )


class Unsure(Verifier):
    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [None if len(response) == 3 else len(response) for response in responses]


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.phase_seconds: dict[str, float] = {}

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> None:
        return None


class Batches(Dataset[PromptBatch]):
    """Batches of ("text", row) prompts whose gold answer is "ab"."""

    def __init__(self, *batches: list[str]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> PromptBatch:
        prompts = [
            Prompt(text=text, gold="ab", dataset="letters", row=10 * i + j)
            for j, text in enumerate(self.batches[i])
        ]
        return PromptBatch(prompts=prompts, token_ids=[[0]] * len(prompts), visits=[0] * len(prompts))


def predict(path: Path, *batches: list[str], unsure: Verifier | None = None, **settings: Any) -> None:
    verifiers = [ExactMatch(extract="whole"), unsure or Unsure(role="shaping")]
    settings = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False} | settings
    trainer = Trainer(
        callbacks=[Recites(), *verifiers, CompletionWriter(str(path))],
        logger=False,
        enable_checkpointing=False,
        **settings,
    )
    trainer.predict(Toy(), DataLoader(Batches(*batches), batch_size=None), return_predictions=False)


def row(text: str, number: int, response: str, reason: str, score: float, unsure: float | None) -> dict[str, Any]:
    return {
        "dataset": "letters",
        "row": number,
        "prompt": text,
        "response": response,
        "gold": "ab",
        "finish_reason": reason,
        "response_tokens": len(response),
        "reward": score,
        "score/exact_match": score,
        "score/unsure": unsure,
    }


EXPECTED = [
    row("ab", 0, "ab", "stop", 1.0, 2.0),
    row("äöü∞", 1, "äöü", "length", 0.0, None),
    row("a\nb", 20, "a\nb", "stop", 0.0, None),
]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_every_completion_is_a_row(tmp_path: Path, suffix: str):
    path = tmp_path / "new" / f"completions{suffix}"
    predict(path, ["ab", "äöü∞"], [], ["a\nb"])
    assert read(path) == EXPECTED
    assert list(path.parent.iterdir()) == [path]
    predict(path, ["ab"])
    assert read(path) == EXPECTED[:1]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_ranks_share_one_file(tmp_path: Path, suffix: str):
    path = tmp_path / f"completions{suffix}"
    predict(path, ["ab", "äöü∞"], [], ["a\nb"], ["ab"], strategy="ddp_fork", devices=2)
    # rank 0 has the batches 0 and 2, rank 1 the batches 1 and 3
    assert read(path) == [*EXPECTED, row("ab", 30, "ab", "stop", 1.0, 2.0)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_text_that_is_no_unicode_is_written(tmp_path: Path, suffix: str):
    path = tmp_path / f"completions{suffix}"
    predict(path, ["\ud83d\x00", "\ud83d\ude00"])  # half a character, and both of its halves
    assert [entry["prompt"] for entry in read(path)] == ["\ufffd\x00", "\U0001f600"]


class Broken(Unsure):
    def score(self, prompts: list[Prompt], responses: list[str]) -> list[Any]:
        return ["x" for _ in responses]


def test_a_run_that_breaks_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "completions.parquet"
    predict(path, ["ab"])
    with pytest.raises(InputError, match="Verifier 'broken' gave 'x'"):
        predict(path, ["ab"], unsure=Broken(role="shaping"))
    assert read(path) == EXPECTED[:1]


def test_settings_and_stages_that_cannot_be(tmp_path: Path):
    with pytest.raises(InputError, match=r"'out\.csv'.*\.parquet or \.jsonl"):
        CompletionWriter("out.csv")
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[CompletionWriter(str(tmp_path / "out.jsonl"))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(InputError, match="RolloutGeneration"):
        trainer.predict(Toy(), DataLoader(Batches(["ab"]), batch_size=None))
