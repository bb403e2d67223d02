"""The data module: prompt sources in, loaders of prompt batches out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.data.curriculum import Curriculum, UniformSampling
from sppo_lightning.data.formatting import PromptFormat, Template
from sppo_lightning.data.layouts import Record, RowError, read_source
from sppo_lightning.data.loader import PromptLoader
from sppo_lightning.data.sources import PromptFile, PromptSource
from sppo_lightning.errors import InputError
from sppo_lightning.routing import why_unusable

_NO_DEMONSTRATION = (
    "no demonstration to learn from (a `response` or `completion` column, another that `columns` names, or the "
    "last turn of `messages` under `layout: chat`)"
)
_CHUNK = 1024  # prompts tokenized at a time when their lengths are checked


class PromptDataModule(LightningDataModule):
    """Prompts with gold answers for `fit`, `validate`, `test` and `predict`.

    A source is a path or hub id, or a `PromptSource` by its class path where it needs settings of its own.

    Args:
        train: The prompts to train on.
        validation: The validation sets by name; the names appear in the metrics, as in `val/<name>/avg@k`.
        test: The test sets by name; the validation sets if left out.
        predict: The prompts to write completions for, gold answers being optional; all validation sets if
            left out.
        batch_size: Prompts per iteration, over all ranks.
        validation_batch_size: Prompts per step of `validate`, `test` and `predict`, over all ranks.
        max_prompt_tokens: Longer prompts are left out, and counted; in tokens, chat template included.
        template: `chat` (the tokenizer's chat template), `plain` (the text as it is), or `auto`: `chat` where
            the tokenizer has a chat template.
        system_prompt: The system turn of every prompt, instead of one that a row may have.
        suffix: Appended as it stands to the last user turn of every prompt whose source has no `suffix` of its own.
        curriculum: Which training prompts come when; each once per epoch if left out.
        shuffle: Draw the training prompts of each epoch in a new order.
        seed: Decides these orders, and what a curriculum draws; the run's seed (`seed_everything`) if left out, or
            0 where there is none.
        on_bad_row: `error` refuses data with rows that cannot be used, `skip` leaves those rows out.
    """

    def __init__(
        self,
        train: str | PromptSource | None = None,
        validation: dict[str, str | PromptSource] | None = None,
        test: dict[str, str | PromptSource] | None = None,
        predict: str | PromptSource | None = None,
        batch_size: int = 256,
        validation_batch_size: int = 256,
        max_prompt_tokens: int = 1024,
        template: Template = "auto",
        system_prompt: str | None = None,
        suffix: str | None = None,
        curriculum: Curriculum | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "validation_batch_size": validation_batch_size}
        for name, value in {**sizes, "max_prompt_tokens": max_prompt_tokens}.items():
            if value < 1:
                raise InputError(f"`{name}`={value} leaves no prompt; use 1 or more.")
        if seed is not None and seed < 0:
            raise InputError(f"`seed`={seed} of the data is negative; use 0 or more.")
        self.train = train
        self.validation = validation or {}
        self.test = test or self.validation
        self.predict = self.validation if predict is None else {"predict": predict}
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.template: Template = template
        self.system_prompt = system_prompt
        self.suffix = suffix
        self.curriculum = curriculum or UniformSampling()
        self.shuffle = shuffle
        self.seed = seed
        self.on_bad_row = on_bad_row
        self.dropped: dict[str, int] = {}  # over-long prompts, by data set
        self.skipped: dict[str, int] = {}  # rows that cannot be used, by data set
        self._train_loader: PromptLoader | None = None
        self._loaders: dict[str, list[PromptLoader]] = {}  # by stage

    @property
    def validation_names(self) -> list[str]:
        """The names of the validation sets, in the order of their loaders."""
        return list(self.validation)

    @property
    def test_names(self) -> list[str]:
        """The names of the test sets, in the order of their loaders."""
        return list(self.test)

    def setup(self, stage: str) -> None:
        """Read, format and check every data set that `stage` uses.

        Raises:
            InputError: For data that cannot be used, a data set that is left empty, and a tokenizer without
                what the format needs.
        """
        stage = TrainerFn(stage).value
        sets = {"test": self.test, "predict": self.predict}.get(stage, self.validation)
        if not sets and stage != "fit":
            raise InputError(f"`data` has no set for {stage}; give `validation` at least one, by name.")
        if "train" in sets:
            raise InputError("`validation` and `test` cannot have a set named train; give it another name.")
        module: Any = self._the_trainer.lightning_module
        prompt_format = PromptFormat(module.policy.tokenizer, self.template, self.system_prompt, self.suffix)
        if stage == "fit":
            self._train_loader = self._build_train_loader(prompt_format)
        rank, world_size = self._shard()
        # who imitates may be validated by the loss alone
        judged = any("scores" in getattr(each, "provides", ()) for each in self._the_trainer.callbacks)  # type: ignore[attr-defined]
        gold_required = stage != "predict" and (judged or not self._imitates)
        self._loaders["validate" if stage == "fit" else stage] = [
            PromptLoader(
                self._load(name, source, prompt_format, gold_required),
                prompt_format,
                self.validation_batch_size,
                rank=rank,
                world_size=world_size,
            )
            for name, source in sets.items()
        ]

    def _build_train_loader(self, prompt_format: PromptFormat) -> PromptLoader:
        if self.train is None:
            raise InputError("`data.train` is not set, so there is nothing to fit; give it a path or a source.")
        self.curriculum.check_module(self._the_trainer.lightning_module)
        prompts = self._load("train", self.train, prompt_format, gold_required=not self._imitates)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        # `overfit_batches` means the same batches in every epoch
        shuffle = self.shuffle and not self._the_trainer.overfit_batches  # type: ignore[attr-defined]
        limit = self._the_trainer.limit_train_batches
        batches = len(prompts) // self.batch_size
        rank, world_size = self._shard()
        return PromptLoader(
            prompts,
            prompt_format,
            self.batch_size,
            rank=rank,
            world_size=world_size,
            train=True,
            curriculum=self.curriculum,
            shuffle=shuffle,
            seed=seed,
            epoch_batches=limit if isinstance(limit, int) else int(batches * limit),
        )

    def _load(
        self, name: str, source: str | PromptSource, prompt_format: PromptFormat, gold_required: bool
    ) -> list[Prompt]:
        """The prompts of one data set that can be used and are short enough."""
        source = PromptFile(source) if isinstance(source, str) else source
        records, bad = read_source(source, gold_required)
        verifiers = [each for each in self._the_trainer.callbacks if hasattr(each, "unusable")]  # type: ignore[attr-defined]
        prompts = []
        for record in records:
            try:
                if self._imitates and name == "train" and record.demonstration is None:
                    raise RowError(_NO_DEMONSTRATION)
                prompt = _formatted(record, name, source, prompt_format, self._imitates)
            except RowError as error:
                bad.add(record.row, str(error))
                continue
            if gold_required and (why := why_unusable(prompt, verifiers)) is not None:
                bad.add(record.row, why)
                continue
            prompts.append(prompt)
        lengths = self._lengths(prompts, prompt_format)
        for prompt in (prompt for prompt, n in zip(prompts, lengths, strict=True) if not n):
            bad.add(prompt.row, "its prompt has no token")
        if bad and self.on_bad_row == "error":
            way_out = "mend or remove them, or set `on_bad_row` to skip"
            raise InputError(f"{source.origin} has {bad.summary()}; {way_out}.")
        if not any(lengths):
            raise InputError(f"{source.origin} has nothing but {bad.summary()}; mend at least one.")
        short = [p for p, n in zip(prompts, lengths, strict=True) if 0 < n <= self.max_prompt_tokens]
        self.skipped[name], self.dropped[name] = len(bad), sum(n > self.max_prompt_tokens for n in lengths)
        rank_zero_info(
            f"{name}: {len(short)} prompts of {source.origin}; left out {self.dropped[name]} longer than "
            f"{self.max_prompt_tokens} tokens and {self.skipped[name]} that cannot be used."
        )
        if not short:
            raise InputError(
                f"`max_prompt_tokens`={self.max_prompt_tokens} leaves none of the {len(prompts)} prompts of "
                f"{source.origin}; raise it."
            )
        return short

    def _lengths(self, prompts: list[Prompt], prompt_format: PromptFormat) -> list[int]:
        """Tokens of each prompt."""
        chunks = (prompts[start : start + _CHUNK] for start in range(0, len(prompts), _CHUNK))
        return [len(ids) for chunk in chunks for ids in prompt_format.encode([prompt.text for prompt in chunk])]

    def prompts(self) -> Iterator[Prompt]:
        """The prompts of every data set that was set up."""
        loaders = [each for loaders in self._loaders.values() for each in loaders]
        for loader in [*loaders, *([self._train_loader] if self._train_loader else [])]:
            yield from loader.prompts

    def train_dataloader(self) -> PromptLoader:
        """The loader of training batches; always the same one, because it knows how far it is."""
        assert self._train_loader is not None
        return self._train_loader

    def spare_prompts(self, count: int) -> PromptBatch:
        """`count` more training prompts for this rank, beside the epoch's; see `PromptLoader.spare`."""
        return self.train_dataloader().spare(count)

    def training_batch(self, positions: Sequence[int]) -> PromptBatch:
        """The training prompts at `positions`, for something else than training."""
        return self.train_dataloader().at(positions)

    def val_dataloader(self) -> list[PromptLoader]:
        """One loader for each validation set."""
        return self._loaders["validate"]

    def test_dataloader(self) -> list[PromptLoader]:
        """One loader for each test set."""
        return self._loaders["test"]

    def predict_dataloader(self) -> list[PromptLoader]:
        """One loader for each set to predict."""
        return self._loaders["predict"]

    def state_dict(self) -> dict[str, Any]:
        """How far the training prompts were drawn, and what their curriculum has learned."""
        # Lightning saves a loader's state too, but after a whole epoch without `max_steps` does not load it
        if self._train_loader is None:
            return {}
        return {"train": self._train_loader.state_dict(), "curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the last training batch that was yielded."""
        if self._train_loader is not None and "train" in state_dict:
            self._train_loader.load_state_dict(state_dict["train"])
            if "curriculum" in state_dict:  # older checkpoints know of none
                self.curriculum.load_state_dict(state_dict["curriculum"])

    @property
    def _the_trainer(self) -> Trainer:
        if self.trainer is None:
            raise InputError("PromptDataModule takes the tokenizer from the model; give both to a Trainer.")
        return self.trainer

    @property
    def _imitates(self) -> bool:
        """Whether the module learns from demonstrations, and from no verdict."""
        return bool(getattr(self._the_trainer.lightning_module, "imitates", False))

    def _shard(self) -> tuple[int, int]:
        """Rank and world size of the data; ranks that compute a model together have prompts of their own too."""
        return self._the_trainer.global_rank, self._the_trainer.world_size


def _formatted(
    record: Record, dataset: str, source: PromptSource, prompt_format: PromptFormat, imitated: bool
) -> Prompt:
    """What the policy reads, and what it would have to write to give the row's demonstration, if `imitated`."""
    text, turns, answer = str(record.prompt), None, record.demonstration
    if not source.rendered:
        text, turns = prompt_format.render(record.prompt, source.suffix)
    if answer is not None and imitated:
        answer = prompt_format.completion(text, turns, answer, record.turn)
    return Prompt(text, record.gold, dataset, record.row, turns, answer, record.metadata)
