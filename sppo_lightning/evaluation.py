"""Validation metrics: avg@k, pass@k, greedy accuracy and the critic's foresight, per data set."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from sppo_lightning.batch import Prompt, Rollouts

_COLUMNS = 5  # data set, problem, reward, greedy, value


def problem_id(prompt: Prompt) -> int:
    """The same number for the same question and gold, exact as a float64; rows may repeat a problem."""
    digest = hashlib.blake2b(f"{prompt.question}\x00{prompt.gold}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


class Evaluation(Metric):
    """Collects every validation response and reports per data set when all are in.

    A data set stored several times over (AIME24: 30 problems in 240 rows) counts each problem once, with all its
    responses. Responses without a verdict count as unsolved in no metric: they are left out. Right under any
    number of ranks with uneven shares, because the rows themselves are gathered.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor]
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, dataset: int, rollouts: Rollouts, values: Tensor | None, greedy: bool = False) -> None:
        """Add responses of data set number `dataset`; `values` `[N]` are the critic's probabilities."""
        if values is None:
            values = torch.full_like(rollouts.rewards, torch.nan)
        table = torch.zeros(len(rollouts), _COLUMNS, dtype=torch.float64, device=self.device)
        table[:, 0] = dataset
        table[:, 1] = torch.tensor([problem_id(p) for p in rollouts.prompts], dtype=torch.float64)
        table[:, 2] = rollouts.rewards
        table[:, 3] = float(greedy)
        table[:, 4] = values
        self.rows.append(table)

    def compute(self) -> Tensor:
        """All rows of all ranks, `[responses, 5]`, float64."""
        return torch.cat([r.reshape(-1, _COLUMNS) for r in self.rows]) if len(self.rows) else torch.zeros(0, 5)

    def report(self, names: Sequence[str]) -> dict[str, float]:
        """Metrics by name; the same number of collective calls on every rank, also on one with no prompts."""
        # an empty row block makes an empty rank take part in the gathering, which else would wait for it
        self.rows.append(torch.zeros(0, _COLUMNS, dtype=torch.float64, device=self.device))
        self._update_count += 1
        table = self.compute().cpu()
        metrics: dict[str, float] = {}
        for index, name in enumerate(names):
            metrics |= _describe(name, table[table[:, 0] == index])
        if len(names) > 1:
            metrics |= _describe("all", table)
        return metrics


def _describe(name: str, table: Tensor) -> dict[str, float]:
    """`val/<name>/…` of the rows of one data set."""
    table = table[~table[:, 2].isnan()]
    metrics: dict[str, float] = {}
    sampled, greedy = table[table[:, 3] == 0], table[table[:, 3] == 1]
    if len(sampled):
        groups = [sampled[sampled[:, 1] == problem] for problem in sampled[:, 1].unique()]
        k = max(len(group) for group in groups)
        rates = torch.stack([group[:, 2].mean() for group in groups])
        metrics[f"val/{name}/avg@{k}"] = float(rates.mean())
        metrics[f"val/{name}/pass@{k}"] = sum(pass_at_k(group[:, 2], k) for group in groups) / len(groups)
        values = torch.stack([group[0, 4] for group in groups])
        if not values.isnan().any():
            metrics[f"val/{name}/value_mean"] = float(values.mean())
            metrics[f"val/{name}/critic_pearson"] = pearson(values, rates)
    if len(greedy):
        metrics[f"val/{name}/greedy"] = float(greedy[:, 2].mean())
    return metrics


def by_dataset(metrics: Mapping[str, Any], kind: str) -> dict[str, float]:
    r"""One validation metric by data set, "all" first, out of everything a run has logged.

    Args:
        metrics: Values by name, such as `trainer.callback_metrics`.
        kind: Pattern of the name's last part: `avg@\d+`, `greedy`, `critic_pearson`.

    Returns:
        `{"all": …, "<dataset>": …}`; "all" is the only data set's where there is one, and nothing without any.
    """
    found = {}
    for name, value in metrics.items():
        if match := re.fullmatch(f"val/(.+)/{kind}", name):
            found[match[1]] = float(value)
    if len(found) == 1:
        found["all"] = next(iter(found.values()))
    return {"all": found.pop("all"), **found} if "all" in found else found


def pass_at_k(rewards: Tensor, k: int) -> float:
    """Unbiased chance that one of `k` draws from these responses succeeds: `1 − C(n−c, k) / C(n, k)`.

    `rewards` `[n]`; a response counts as a success at 1.0. Source: Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    n, successes = len(rewards), int((rewards >= 1.0).sum())
    return 1.0 - comb(n - successes, min(k, n)) / comb(n, min(k, n))


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two vectors `[n]`; 0 where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = x.norm() * y.norm()
    return float((x @ y) / scale) if scale > 1e-12 else 0.0


def critic_metrics(values: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """`critic/…`: how well the predicted chances `values` `[N]` agree with the outcomes `rewards` `[N]`.

    `brier_skill` is the share of the batch mean's squared error that the critic removes: 0 is as good as knowing
    the mean pass rate, below 0 is worse. `auroc` takes a reward of 0.5 or more as success and is left out where
    all outcomes agree.
    """
    values, rewards = values.contiguous(), rewards.contiguous()
    brier = (values - rewards).square().mean()
    metrics = {"critic/brier": brier}
    metrics["critic/pearson"] = torch.tensor(pearson(values, rewards))
    spread = rewards.var(correction=0)
    if spread > 1e-12:  # equal rewards such as 0.1 have a rounding error for a variance
        metrics["critic/brier_skill"] = 1.0 - brier / spread
    outcomes = (rewards >= 0.5).long()
    metrics["critic/calibration_error"] = binary_calibration_error(values, outcomes, n_bins=10)
    if 0 < int(outcomes.sum()) < len(outcomes):
        metrics["critic/auroc"] = binary_auroc(values, outcomes)
    return metrics
