"""The base class of every verifier: a stage that scores responses."""

from __future__ import annotations

import math
import numbers
import re
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts, Scores
from sppo_lightning.callbacks.early_scores import EarlyScores
from sppo_lightning.errors import InputError
from sppo_lightning.pipeline import Stage
from sppo_lightning.routing import Role, Truncated, check_routes, check_settings, check_together

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class VerifierFailure(RuntimeError):
    """A verifier failed on more responses of a batch than its `max_failure_rate` allows."""


class Verifier(Stage):
    """Scores each response; a subclass writes `score` and nothing else.

    The scores land in `rollouts.scores[name]`. A failure is not a score: a response on which `score` raises
    gets no verdict, is counted, and past `max_failure_rate` stops the run with the first traceback.

    Args:
        weight: Weight of this verifier's scores among the verifiers of the same role.
        role: "outcome" scores lie in [0, 1] and are the reward; "shaping" scores may be any number and are
            added to the advantage, centred by their running mean.
        name: Name in metrics and in `rollouts.scores`; the class name in snake case where none is given.
        max_failure_rate: Share of a batch's responses, from 0 to 1, that may fail before the run stops.
        applies_to: The data sets, by their names or by what the rows' column `data_source` says, whose responses
            this verifier scores; all where left out. Elsewhere it counts as if it were not there.
        only_if_correct: Count only where the outcome verifiers listed before give full marks. Elsewhere an outcome
            score is 0, and a shaping score adds nothing, so that it can never pay more than being right.
        truncated: What is done with a response that was cut off: "scored" as any other, or "unanswered", which
            is an outcome of 0 and adds nothing to the shaping.
    """

    requires = frozenset({"rollouts"})
    phase = "verify"
    scores_early: ClassVar[bool] = False  # whether `score` waits for other processes, so that it may start early

    def __init__(
        self,
        weight: float = 1.0,
        role: Role = "outcome",
        name: str | None = None,
        max_failure_rate: float = 0.01,
        applies_to: Sequence[str] | None = None,
        only_if_correct: bool = False,
        truncated: Truncated = "scored",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.role = role
        self.name = _WORD_START.sub("_", type(self).__name__).lower() if name is None else name
        self.max_failure_rate = max_failure_rate
        self.applies_to = None if applies_to is None else tuple(applies_to)
        self.only_if_correct = only_if_correct
        self.truncated = truncated
        check_settings(self)
        if only_if_correct:
            self.requires = self.requires | {"scores"}  # type: ignore[misc]
        # only an outcome is a reward, which is what the module needs scores for
        self.provides = frozenset({"scores"} if role == "outcome" else ())  # type: ignore[misc]
        self._total, self._number = 0.0, 0.0  # of the shaping scores of all batches trained on so far
        Verifier.begin(self)  # not a subclass's, which may need what its own constructor has yet to set
        self._early = EarlyScores(self) if self.scores_early else None
        self._is_set_up = False

    def begin(self) -> None:
        """Start the counts of a new batch."""
        self.counts: Counter[str] = Counter()  # of the batch at hand, see `score`
        self._responses = 0  # scored for it
        self._seconds = 0.0
        self._first_traceback = ""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """Give each response its score, or `None` for no verdict.

        May raise: the responses are then scored one by one, and those that raise again get no verdict. A
        verifier that catches its own failures adds them to `self.counts["errors"]`; `self.counts["timeouts"]`
        is for those that are the response's doing and do have a score.

        Args:
            prompts: The prompt of each response, with `gold` and the row's `metadata`.
            responses: N responses, without special tokens.

        Returns:
            N scores: in [0, 1] for the role "outcome", any finite number for "shaping".
        """
        raise NotImplementedError(f"{type(self).__name__} must define score().")

    def score_rollouts(self, rollouts: Rollouts) -> list[float | None]:
        """Give each of N responses its score; overridden where a score needs more than the text, see `score`."""
        return self.score(rollouts.prompts, rollouts.responses)

    def unusable(self, prompt: Prompt) -> str | None:
        """Why this verifier can never score responses to a prompt, or `None`; asked when data sets are loaded."""
        return None

    def applies(self, prompt: Prompt) -> bool:
        """Whether responses to a prompt are scored here, see `applies_to`."""
        return self.applies_to is None or not prompt.sources.isdisjoint(self.applies_to)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the order of the stages, that no two verifiers share a name, and that every prompt has one."""
        self._is_set_up = True
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if self not in callbacks:
            return  # another callback runs it, in its own place and not for the reward
        super().setup(trainer, pl_module, stage)
        verifiers = [other for other in callbacks if isinstance(other, Verifier)]
        check_together(self, verifiers)
        if self is verifiers[0]:  # once for all of them
            check_routes(verifiers, getattr(trainer, "datamodule", None), stage)

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Score the sampled responses, and the greedy ones where there are any."""
        start = time.perf_counter()
        for rollouts in (batch.rollouts, batch.greedy_rollouts):
            if rollouts is not None:
                rollouts.scores[self.name] = self._scores(rollouts)
        self._seconds += time.perf_counter() - start

    def score_early(self, rollouts: Rollouts) -> None:
        """Begin with responses that have finished while others are still sampled; see `scores_early`."""
        if self._early is None or self.only_if_correct:
            return
        cut_off = [self.truncated == "unanswered" and why == "length" for why in rollouts.finish_reasons]
        rows = [i for i, prompt in enumerate(rollouts.prompts) if self.applies(prompt) and not cut_off[i]]
        if rows:
            self._early.ask(rollouts.rows(rows))

    def _scores(self, rollouts: Rollouts) -> Scores:
        """The scores of N responses, of which `score` sees those that its verdict counts for."""
        applies = [self.applies(prompt) for prompt in rollouts.prompts]
        asked = applies
        if self.only_if_correct:
            asked = [a and b for a, b in zip(asked, rollouts.correct.tolist(), strict=True)]
        if self.truncated == "unanswered":
            asked = [a and why != "length" for a, why in zip(asked, rollouts.finish_reasons, strict=True)]
        values = torch.full((len(rollouts),), math.nan, dtype=torch.float32, device=rollouts.response_mask.device)
        if self.role == "shaping":
            applies = asked
        else:
            values[torch.tensor(applies, dtype=torch.bool)] = 0.0  # and what is asked for replaces it
        rows = [row for row, is_asked in enumerate(asked) if is_asked]
        values[rows] = self._score(rollouts if len(rows) == len(rollouts) else rollouts.rows(rows))
        selects = self.applies_to is not None or self.only_if_correct or self.truncated == "unanswered"
        counts = torch.tensor(applies, dtype=torch.bool, device=values.device) if selects else None
        return Scores(values, self.weight, self.role, self._mean(), counts, self.only_if_correct)

    def _score(self, rollouts: Rollouts) -> torch.Tensor:
        """The scores, `[N]`, float32, NaN where there is no verdict."""
        before = self.counts.copy()
        scores: list[float | None] = []
        if len(rollouts):
            try:
                scores = self._checked(rollouts)
            except InputError:
                raise
            except Exception:  # whatever a verifier raises is a failure that is counted, up to `max_failure_rate`
                self._first_traceback = self._first_traceback or traceback.format_exc()
                self.counts = before.copy()  # what the failed call counted is counted again, row by row
                scores = self._score_one_by_one(rollouts)
        self._responses += len(rollouts)
        failures = self.counts["errors"] + self.counts["timeouts_raised"]
        if failures > self.max_failure_rate * self._responses:
            raise VerifierFailure(
                f"Verifier {self.name!r} failed on {failures} of {self._responses} responses "
                f"({failures / self._responses:.1%}), more than `max_failure_rate`={self.max_failure_rate:g} "
                f"allows. The first failure:\n{self._first_traceback or 'the verifier reported it itself'}"
            )
        self.counts["no_verdict"] += sum(score is None for score in scores)
        values = [math.nan if score is None else float(score) for score in scores]
        return torch.tensor(values, dtype=torch.float32, device=rollouts.response_mask.device)

    def _score_one_by_one(self, rollouts: Rollouts) -> list[float | None]:
        scores: list[float | None] = []
        for row in range(len(rollouts)):
            try:
                scores += self._checked(rollouts.rows([row]))
            except InputError:
                raise
            except TimeoutError:
                self.counts.update(timeouts=1, timeouts_raised=1)
                scores.append(None)
            except Exception:  # as above
                self.counts["errors"] += 1
                scores.append(None)
        return scores

    def _checked(self, rollouts: Rollouts) -> list[float | None]:
        scores = list(self.score_rollouts(rollouts) if self._early is None else self._early.complete(rollouts))
        if len(scores) != len(rollouts):
            raise InputError(
                f"Verifier {self.name!r} returned {len(scores)} scores for {len(rollouts)} responses; "
                "return one for each, `None` for no verdict."
            )
        for prompt, score in zip(rollouts.prompts, scores, strict=True):
            self._check_score(prompt, score)
        return scores

    def _check_score(self, prompt: Prompt, score: Any) -> None:
        if score is None:
            return
        outcome = self.role == "outcome"
        finite = isinstance(score, numbers.Real) and math.isfinite(score)
        if finite and (not outcome or 0 <= score <= 1):
            return
        wanted = "a number in [0, 1]" if outcome else "a finite number"
        hint = ", or set `role: shaping`," if outcome and finite else ""
        raise InputError(
            f"Verifier {self.name!r} gave {score!r} to a response to row {prompt.row} of {prompt.dataset!r}; "
            f"return {wanted}{hint} or `None` for no verdict."
        )

    def _mean(self) -> float:
        return self._total / self._number if self.role == "shaping" and self._number else 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Log the batch, and move the running mean by the responses that were trained on, alike on every rank."""
        if batch.rollouts is None:  # supervised learning scores nothing
            return
        values = batch.rollouts.scores[self.name].values
        counts = self._counts()
        # one call for everything, made on every rank, whether or not the rank has responses
        row = [*counts.values(), values.nansum().item(), (~values.isnan()).sum().item()]
        sums = torch.tensor(row, dtype=torch.float32, device=pl_module.device)
        *reduced, total, number = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self._total += total
        self._number += number
        metrics = dict(zip(counts, reduced, strict=True)) | self._time()
        if number:
            metrics[f"reward/{self.name}"] = total / number
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to the sums that are logged at the end of the loop."""
        metrics = self._counts() | self._time()
        pl_module.log_dict(metrics, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True, batch_size=1)

    on_test_batch_end = on_validation_batch_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the thread that scores early."""
        if self._early is not None:
            self._early.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same as `teardown`, which Lightning skips after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def _counts(self) -> dict[str, float]:
        kinds = ("errors", "timeouts", "no_verdict")
        return {f"verifier/{self.name}/{kind}": float(self.counts[kind]) for kind in kinds}

    def _time(self) -> dict[str, float]:
        return {f"verifier/{self.name}/seconds": self._seconds}

    @property
    def state_key(self) -> str:
        """The key of this verifier's state in a checkpoint: its class and its name."""
        key = f"{type(self).__qualname__}[{self.name}]"
        # Lightning refuses equal keys before `setup`, in words that do not name the setting to change
        return key if self._is_set_up else f"{key}@{id(self)}"

    def state_dict(self) -> dict[str, float]:
        """The running mean of a shaping verifier, as a sum and a number of scores."""
        return {"total": self._total, "number": self._number}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue the running mean of a checkpoint."""
        self._total, self._number = state_dict["total"], state_dict["number"]
