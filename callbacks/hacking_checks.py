"""How HackingMonitor asks a verifier without letting its scores, its failures or its side effects into the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.callbacks.verifier import Verifier
from sppo_lightning.suspicion import Record, spread

Verdicts = list[float | None]  # N, None where a response was not asked about or got no verdict


def run_checks(
    checks: Sequence[Verifier],
    record: Record,
    batch: PromptBatch,
    trainer: Trainer,
    module: LightningModule,
    at_most: int,
) -> dict[str, Verdicts]:
    """Ask each check about at most so many responses that have a reward, and note in the record what it says.

    Every rank asks, if about nothing, since a check may itself need the others.
    """
    found: dict[str, Verdicts] = {}
    assert batch.rollouts is not None
    rewards = batch.rollouts.rewards.tolist()
    for check in checks:
        # whatever a check draws or differentiates, training goes on as without it
        with isolate_rng(include_cuda=torch.cuda.is_initialized()), torch.no_grad():
            found[check.name] = _ask(check, record, batch, rewards, trainer, module, at_most)
        record.compare(check.name, rewards, found[check.name])
    return found


def _ask(
    check: Verifier,
    record: Record,
    batch: PromptBatch,
    rewards: list[float],
    trainer: Trainer,
    module: LightningModule,
    at_most: int,
) -> Verdicts:
    verdicts: Verdicts = [None] * len(rewards)
    rollouts = batch.rollouts
    assert rollouts is not None
    rows: list[int] = []
    failed = None
    check.begin()
    try:
        rows = _rows(check, rollouts, rewards, at_most)
        copy = batch.rows(range(len(batch)))
        copy.rollouts = rollouts.rows(rows)  # with a dict of scores of its own
        check.process(copy, trainer, module)
        scores = copy.rollouts.scores[check.name]
        for row, value, counts in zip(rows, scores.values.tolist(), scores.counts.tolist(), strict=True):
            verdicts[row] = value if counts and value == value else None
        failed = check.counts["errors"] + check.counts["timeouts_raised"]
        cause = check._first_traceback
    except Exception as error:
        failed, cause = max(len(rows), 1), str(error) or type(error).__name__
    record.failures[check.name] = record.failures.get(check.name, 0) + failed
    if failed:
        last = (cause.strip().splitlines() or ["it reported it itself"])[-1]
        record.causes.setdefault(check.name, ascii(last)[1:-1][:300])  # it may quote a response
    return verdicts


def _rows(check: Verifier, rollouts: Rollouts, rewards: list[float], at_most: int) -> list[int]:
    """The responses to ask about, evenly spread over those that the check can judge and that have a reward."""
    applies = [check.applies(prompt) for prompt in rollouts.prompts]
    rows = [row for row, reward in enumerate(rewards) if applies[row] and reward == reward]
    return [row for row in spread(rows, at_most) if check.unusable(rollouts.prompts[row]) is None]
