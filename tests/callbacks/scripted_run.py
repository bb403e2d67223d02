"""Runs in which a script says what each sample of a prompt scores, and in which order spare prompts come."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from tiny_run import Recorder, Words, sppo, trainer_of

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.callbacks import RolloutGeneration, Verifier
from sppo_lightning.data import PromptDataModule
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.pipeline import Stage

PAIR = Sampling(max_new_tokens=3, samples_per_prompt=2)
GOOD, BAD, OPEN = (1.0, 0.0), (1.0, 1.0), (None, 1.0)


class Scripted(Verifier):
    """Scores the samples of a prompt, in their order, by the prompt's row."""

    def __init__(self, script: Mapping[int, Sequence[float | None]], rest: Sequence[float | None] = GOOD) -> None:
        super().__init__()
        self.script, self.rest = script, rest

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        time.sleep(0.02)
        samples = len(self.rest)
        return [self.script.get(p.row, self.rest)[i % samples] for i, p in enumerate(prompts)]


class RowAsScore(Verifier):
    """A shaping score, whose running mean all rounds of an iteration must share."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [float(prompt.row) for prompt in prompts]


class Calls(Stage):
    """Notes rows and sampled tokens of each batch that passes, spare ones too."""

    requires = frozenset({"rollouts"})

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.tokens: list[float] = []

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        assert batch.rollouts is not None
        self.rows.append([prompt.row for prompt in batch.prompts])
        self.tokens.append(float(batch.rollouts.response_mask.sum()))
        if batch.greedy_rollouts is not None:
            self.tokens[-1] += float(batch.greedy_rollouts.response_mask.sum())


class SamplesAgain(Stage):
    """Notes the batch that is trained on, and what the engine gives for it when it is asked for all of it at once."""

    requires = frozenset({"rollouts"})

    def __init__(self) -> None:
        self.seen: list[tuple[PromptBatch, PromptBatch]] = []

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.training:
            return
        again, engine = PromptBatch(batch.prompts, batch.token_ids, batch.visits), HFEngine()
        engine.update_weights(module.policy, trainer.global_step)  # type: ignore[arg-type]
        again.rollouts = engine.generate(again, PAIR)
        if batch.greedy_rollouts is not None:
            again.greedy_rollouts = engine.generate(again, Sampling(temperature=0.0, max_new_tokens=3))
        self.seen.append((batch, again))


class GivesSpares(PromptDataModule):
    """Gives its spare prompts in an order that the test decides."""

    def __init__(self, order: Sequence[int], size: int = 16, **settings: Any) -> None:
        super().__init__(Words(size), shuffle=False, **{"batch_size": 4} | settings)
        self.order = list(order)

    def spare_prompts(self, count: int) -> PromptBatch:
        taken, self.order = self.order[:count], self.order[count:]
        prompts = {prompt.row: prompt for prompt in self.train_dataloader().prompts}
        ids = self.train_dataloader().prompt_format.encode([prompts[row].text for row in taken])
        return PromptBatch([prompts[row] for row in taken], ids, [-1 - row for row in taken])


def fit(folder: Path, spares: PromptDataModule, verifier: Verifier, *more: Any, **settings: Any) -> Recorder:
    recorder = Recorder()
    stages = [RolloutGeneration(PAIR, greedy=settings.pop("greedy", False)), verifier]
    trainer = trainer_of([*stages, *more, recorder], **{"limit_train_batches": 1} | settings)
    trainer.fit(sppo(folder), spares)
    return recorder


def rows(batch: PromptBatch) -> list[int]:
    return [prompt.row for prompt in batch.prompts]
