"""The stage that searches for an answer where the policy would hardly ever find one by chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sppo_lightning.batch import Prompt, PromptBatch, Success
from sppo_lightning.callbacks.rollout_generation import RolloutGeneration
from sppo_lightning.callbacks.verifier import Verifier
from sppo_lightning.engines import BestOfN, SearchEngine, TreeSearchEngine
from sppo_lightning.engines.search import Candidate, Found
from sppo_lightning.errors import InputError, check_settings
from sppo_lightning.found_losses import Demonstrations, FoundLoss
from sppo_lightning.module import SPPOModule
from sppo_lightning.pipeline import Stage
from sppo_lightning.successes import as_rollouts, learn


class SearchHopeless(Stage):
    """Searches for a success where the critic's V is below a threshold and no sampled response is right.

    What it finds is learned from in an auxiliary loss, `coef · mean over tokens of −weight · log π(y_t | …)`, whose
    gradient joins that of the iteration's first update; the module's clipping and its check of what is not finite
    hold for both. The critic never sees what was found, and `batch.rollouts` stays as it was sampled: V goes on
    to predict the policy alone. Nothing is searched while the critic warms up.

    List it after the verifiers, which are the judge: their outcome scores, by their weights, of a response's text;
    their counts and seconds are then also of the search. Responses that were cut off are not learned from.

    Logs, over all ranks, `search/prompts`, `search/solved_fraction`, `search/tokens`,
    `search/success_per_1k_tokens`, `search/loss`, `search/weight_mean`, `search/truncated_fraction` and, where it
    compares, the first four of independent samples as `search/independent_…`.

    What is found is left on the batch as `batch.found`; SuccessReplay keeps it, to be learned from again.

    Args:
        search: How to search; it samples with RolloutGeneration's engine unless it has one of its own.
        below: V, in [0, 1], under which a prompt is searched.
        max_prompts: Most prompts searched per iteration on each rank: those with the highest V of them, in which a
            success is likeliest to be found.
        loss: How what is found is learned from.
        coef: Weight of the auxiliary loss; 0 learns nothing and only reports.
        compare_every_n_iterations: So often the same prompts also get independent samples with the same budget
            (`TreeSearchEngine.budget_tokens`), for the report alone; 0 never. Counted from where the run starts
            or is resumed.
    """

    requires = frozenset({"rollouts", "scores"})
    phase = "search"
    once = True

    def __init__(
        self,
        search: SearchEngine | None = None,
        below: float = 0.1,
        max_prompts: int = 16,
        loss: FoundLoss | None = None,
        coef: float = 0.1,
        compare_every_n_iterations: int = 0,
    ) -> None:
        super().__init__()
        every = compare_every_n_iterations
        check_settings(
            "SearchHopeless",
            ("below", below, 0 < below <= 1, "above 0 and at most 1"),
            ("max_prompts", max_prompts, max_prompts >= 1, "1 or more"),
            ("coef", coef, 0 <= coef < float("inf"), "0 or more"),
            ("compare_every_n_iterations", every, every >= 0, "0 or more"),
        )
        self.search = search or TreeSearchEngine()
        self.below = below
        self.max_prompts = max_prompts
        self.loss = loss or Demonstrations()
        self.coef = coef
        self.compare_every_n_iterations = compare_every_n_iterations
        self._iterations = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a V to go by, and find the engine that samples."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        generations = [each for each in before if isinstance(each, RolloutGeneration)]
        if not generations:
            raise InputError("SearchHopeless samples as RolloutGeneration does; list RolloutGeneration before it.")
        self._generation = generations[0]
        self._verifiers = [each for each in before if isinstance(each, Verifier) and each.role == "outcome"]
        if stage == "fit" and getattr(getattr(pl_module, "critic", None), "reads", None) != "prompt":
            raise InputError(
                "`trainer.callbacks` lists SearchHopeless, which goes by a critic that reads prompts, but there is "
                "none; use sppo_lightning.models.PromptCritic, or remove SearchHopeless."
            )
        if self.search.engine is None:
            if self._generation.prefetch:
                raise InputError(
                    "`RolloutGeneration.prefetch`=1 keeps its engine busy while SearchHopeless would use it; give "
                    "`SearchHopeless.search` an `engine` of its own, or set `prefetch: 0`."
                )
            self.search.engine = self._generation.engine

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the engine; one that is RolloutGeneration's is closed twice, which does nothing."""
        self.search.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same; Lightning skips `teardown` after an exception."""
        self.search.close()

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Search, report, leave what is found on the batch, and the loss's gradient for the first update."""
        batch.found = []
        if not trainer.training:
            return
        assert isinstance(module, SPPOModule)
        if "policy" not in module.moving_modules():
            return  # the critic warms up: V says nothing yet, and the policy would not learn
        with trainer.precision_plugin.forward_context():
            self.search.update_weights(module.policy, trainer.global_step)
            self.search.judge = lambda prompts, texts: self._judged(prompts, texts, trainer, module)
            values = module.prompt_values(batch)
            assert values is not None
            chosen = hopeless(batch, values, self.below, self.max_prompts)
            hard = batch.rows(chosen)
            found = self.search.search(hard, self._generation.sampling)
            metrics = _report(found, trainer, module, "search/")
            every = self.compare_every_n_iterations
            if every and self._iterations % every == 0:
                metrics |= self._independent(hard, trainer, module)
            self._iterations += 1
            best = successes(found)
            batch.found = [_success(hard, i, each) for i, each in best]
            if self.coef:
                metrics |= self._learn(batch.found, values[[chosen[i] for i, _ in best]], module)
        module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def _learn(self, found: list[Success], values: Tensor, module: SPPOModule) -> dict[str, float]:
        temperature = self._generation.sampling.temperature or 1.0
        learned = learn(found, values, torch.ones_like(values), self.loss, self.coef, temperature, module)
        return {f"search/{name}": value for name, value in learned.items()}

    def _independent(self, hard: PromptBatch, trainer: Trainer, module: SPPOModule) -> dict[str, float]:
        assert self.search.engine is not None
        budget = getattr(self.search, "budget_tokens", None)
        alone = BestOfN(self.search.engine, n=2**16 if budget else 16, at_once=4, budget_tokens=budget)
        alone.judge, alone.policy = self.search.judge, module.policy  # the engine has its weights
        found = alone.search(hard, self._generation.sampling)
        return _report(found, trainer, module, "search/independent_")

    def _judged(
        self, prompts: list[Prompt], texts: list[str], trainer: Trainer, module: SPPOModule
    ) -> Sequence[Any]:
        """Rewards of the texts, NaN where a verifier gave no verdict."""
        ids = module.policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
        scratch = PromptBatch(prompts, [[] for _ in prompts], [0] * len(prompts))
        given = [Success(p, [], row, [0.0 for _ in row], 0.0) for p, row in zip(prompts, ids, strict=True)]
        scratch.rollouts = as_rollouts(given, 1.0, module)
        scratch.rollouts.responses = texts
        for verifier in self._verifiers:
            verifier.process(scratch, trainer, module)
        return scratch.rollouts.rewards.tolist()


def hopeless(batch: PromptBatch, values: Tensor, below: float, most: int) -> list[int]:
    """Rows of the prompts with V `[B]` below a threshold and no right response, the highest V first."""
    assert batch.rollouts is not None
    solved = set(batch.rollouts.prompt_index[batch.rollouts.correct].tolist())
    order: list[int] = values.argsort(descending=True, stable=True).tolist()
    return [i for i in order if values[i] < below and i not in solved][:most]


def successes(found: Sequence[Found]) -> list[tuple[int, Candidate]]:
    """The first response with full marks that was not cut off, of each prompt that has one, by the prompt's row."""
    good = (
        [each for each in one.candidates if each.score >= 1.0 and each.response.finish_reason == "stop"]
        for one in found
    )
    return [(i, row[0]) for i, row in enumerate(good) if row]


def _success(batch: PromptBatch, row: int, candidate: Candidate) -> Success:
    """A candidate that answers the prompt in this row."""
    response = candidate.response
    return Success(
        batch.prompts[row],
        batch.token_ids[row],
        response.token_ids,
        response.log_probs,
        candidate.score,
        candidate.log_excess,
    )


def _report(found: Sequence[Found], trainer: Trainer, module: LightningModule, prefix: str) -> dict[str, float]:
    row = [len(found), sum(each.solved for each in found), sum(each.tokens for each in found)]
    sums = torch.tensor(row, dtype=torch.float64).to(module.device, torch.float32)
    prompts, solved, tokens = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    return {
        f"{prefix}prompts": prompts,
        f"{prefix}solved_fraction": solved / max(prompts, 1.0),
        f"{prefix}tokens": tokens,
        f"{prefix}success_per_1k_tokens": 1000.0 * solved / max(tokens, 1.0),
    }
