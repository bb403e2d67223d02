"""A verifier that asks a learned reward model."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.verifier import Truncated, Verifier
from sppo_lightning.errors import InputError, check_option
from sppo_lightning.models.loading import first_sentence
from sppo_lightning.models.reward_model import RewardModel

RewardDtype = Literal["bfloat16", "float16", "float32"]


class RewardModelVerifier(Verifier):
    """Scores a response by a Hugging Face sequence-classification model with one label.

    The model reads the prompt's turns, or its text as one user turn, and the response as the assistant's, under
    its own chat template; without one, the prompt's text with the response behind it. It is loaded when the run
    starts, never trained and never saved. A text that is too long, or a score that is no finite number, gives no
    verdict.

    As an outcome it rarely gives full marks, without which no response is correct: beside another outcome give it
    `only_if_correct`, or the role "shaping".

    Args:
        model: Folder or hub id of the model and its tokenizer.
        squash: Take the sigmoid of the model's score, which lies in (0, 1) as an outcome must, in place of the
            score itself, which may be any number.
        max_tokens: The longest text, prompt and response, that is scored, in tokens; what the model and its
            tokenizer are made for when left out.
        micro_batch_tokens: Token budget of one forward, padding included; texts of similar length go together.
        device: Where the model is, such as "cuda:1" or "cpu"; the device of this rank when left out.
        dtype: Of its weights and of its forward.
        trust_remote_code: Run Python code that comes with the model.
        truncated: A response that was cut off is "unanswered", which is an outcome of 0 and adds nothing to the
            shaping, or "scored" as any other.
        **settings: Those of every verifier: see `Verifier`.
    """

    def __init__(
        self,
        model: str,
        squash: bool = True,
        max_tokens: int | None = None,
        micro_batch_tokens: int = 16384,
        device: str | None = None,
        dtype: RewardDtype = "bfloat16",
        trust_remote_code: bool = False,
        truncated: Truncated = "unanswered",
        **settings: Any,
    ) -> None:
        super().__init__(truncated=truncated, **settings)
        check_option("RewardModelVerifier.dtype", dtype, RewardDtype)
        if self.role == "outcome" and not squash:
            raise InputError(
                "`RewardModelVerifier.squash`=False leaves scores that are not in [0, 1]; set it to true, or "
                "`role: shaping`."
            )
        for setting, value in (("max_tokens", max_tokens), ("micro_batch_tokens", micro_batch_tokens)):
            if value is not None and value < 1:
                raise InputError(f"`RewardModelVerifier.{setting}`={value} leaves nothing to read; use 1 or more.")
        self.model, self.squash, self.trust_remote_code = model, squash, trust_remote_code
        self.max_tokens, self.micro_batch_tokens = max_tokens, micro_batch_tokens
        self.device, self.dtype = _device(device), dtype
        self.reward_model: RewardModel | None = None  # from `setup` to `teardown`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the model and put it on its device."""
        super().setup(trainer, pl_module, stage)
        setting = "RewardModelVerifier.model"
        loaded = RewardModel(self.model, setting, getattr(torch, self.dtype), self.trust_remote_code)
        if self.max_tokens is not None and loaded.max_tokens is not None and self.max_tokens > loaded.max_tokens:
            raise InputError(
                f"`RewardModelVerifier.max_tokens`={self.max_tokens} is more than the {loaded.max_tokens} that "
                f"{self.model!r} is made for; use that or less."
            )
        device = self.device or trainer.strategy.root_device
        try:
            loaded.model.to(device)
        except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for the device
            raise InputError(
                f"`RewardModelVerifier.device`={device} cannot take {self.model!r} ({first_sentence(error)}); use "
                "another, such as cpu."
            ) from error
        self.reward_model = loaded

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """The scores, and `None` for texts that are empty or too long and for scores that are not finite."""
        if self.reward_model is None:
            raise RuntimeError("The reward model is loaded by `setup`, which has not run.")
        read = [self.reward_model.encode(*pair) for pair in zip(prompts, responses, strict=True)]
        limit = self.max_tokens or self.reward_model.max_tokens or math.inf
        rows = [row for row, ids in enumerate(read) if 0 < len(ids) <= limit]
        found = self.reward_model.scores([read[row] for row in rows], self.micro_batch_tokens)
        scores: list[float | None] = [None] * len(read)
        for row, score in zip(rows, found, strict=True):
            if math.isfinite(score):
                scores[row] = (1 + math.tanh(score / 2)) / 2 if self.squash else score  # the sigmoid, anywhere
        return scores

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the model."""
        super().teardown(trainer, pl_module, stage)
        self.reward_model = None


def _device(name: str | None) -> torch.device | None:
    try:
        return None if name is None else torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"`RewardModelVerifier.device`={name!r} names no device ({first_sentence(error)}); use cuda:0 or cpu, "
            "or leave it out."
        ) from error
