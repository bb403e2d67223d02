"""Validation metrics: avg@k, pass@k, maj@k, greedy accuracy and the critic's foresight, per data set."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sppo_lightning.batch import Prompt, Rollouts
from sppo_lightning.calibration import critic_metrics
from sppo_lightning.confidence import PolicyConfidence
from sppo_lightning.verification.extraction import extract_answer
from sppo_lightning.verification.notation import Malformed, normalize
from sppo_lightning.verification.numbers import exact_number

_COLUMNS = ("dataset", "row", "sample", "problem", "greedy", "reward", "value", "answer", "confidence")
_ORDER = _COLUMNS[:3]  # says which response is earlier, whatever rank it was sampled on


def digest(text: str) -> int:
    """48 bits of `text`, which a float64 holds exactly."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=6).digest(), "little")


def problem_id(prompt: Prompt) -> int:
    """The same number for the same question and gold, exact as a float64; rows may repeat a problem."""
    return digest(f"{prompt.question}\x00{prompt.gold}")


def answer_key(response: str) -> float:
    r"""The same number, exact as a float64, for responses with the same final answer; NaN for one without.

    Answers are the same where they are written alike (spacing and how LaTeX writes a fraction aside) or are the
    same number: `0.5` and `\frac12` are, `5` and `x=5` are not.
    """
    answer = extract_answer(response)
    if answer is None:
        return math.nan
    try:
        text = normalize(answer)
    except Malformed:
        text = answer
    number = exact_number(text)
    return float(digest(text if number is None else str(number)))


class Evaluation(Metric):
    """Collects every validation response and reports per data set when all are in.

    A data set stored several times over (AIME24: 30 problems in 240 rows) counts each problem once, with all its
    responses. Responses without a verdict count as unsolved in no metric: they are left out. Right under any
    number of ranks with uneven shares, because the rows themselves are gathered and put in order.

    Attributes:
        last_problems: The problems of the last report by data set, the same on every rank, "all" being all of
            them where there are several data sets; data sets without a sampled response are missing.
        confidence: Where it is set, the policy's confidence in its responses is kept, and reported, too.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor]
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.last_problems: dict[str, ProblemTable] = {}
        self.confidence: PolicyConfidence | None = None

    def update(self, dataset: int, rollouts: Rollouts, values: Tensor | None, greedy: bool = False) -> None:
        """Add responses of data set number `dataset`; `values` `[N]` are the critic's probabilities."""
        nothing = [math.nan] * len(rollouts)
        columns: dict[str, Any] = {
            "dataset": [dataset] * len(rollouts),
            "row": [prompt.row for prompt in rollouts.prompts],
            "sample": _occurrences(rollouts.prompt_index.tolist()),
            "problem": [problem_id(prompt) for prompt in rollouts.prompts],
            "greedy": [greedy] * len(rollouts),
            "reward": rollouts.rewards,
            "value": nothing if values is None else values,
            "answer": [answer_key(response) for response in rollouts.responses],
            "confidence": nothing if self.confidence is None or greedy else self.confidence.of(rollouts),
        }
        made = [torch.as_tensor(columns[name], dtype=torch.float64, device=self.device) for name in _COLUMNS]
        self.rows.append(torch.stack(made, dim=1))

    def compute(self) -> Tensor:
        """All responses of all ranks, `[responses, columns]`, float64, by data set, row and sample."""
        rows = dim_zero_cat(self.rows)  # a list before the ranks' rows are gathered, one tensor after
        for name in reversed(_ORDER):
            rows = rows[_column(rows, name).argsort(stable=True)]
        return rows

    def report(self, names: Sequence[str]) -> dict[str, float]:
        """Metrics by name; the same number of collective calls on every rank, also on one with no prompts."""
        # an empty row block makes an empty rank take part in the gathering, which else would wait for it
        self.rows.append(torch.zeros(0, len(_COLUMNS), dtype=torch.float64, device=self.device))
        self._update_count += 1
        table = self.compute().cpu()
        table = table[~_column(table, "reward").isnan()]
        parts = {name: table[_column(table, "dataset") == index] for index, name in enumerate(names)}
        if len(names) > 1:
            parts["all"] = table
        metrics: dict[str, float] = {}
        self.last_problems = {}
        for name, rows in parts.items():
            greedy = _column(rows, "greedy") > 0
            if not greedy.all():
                problems = self.last_problems[name] = _problems(rows[~greedy])
                found = problems.metrics() | ({} if self.confidence is None else self.confidence.metrics(problems))
                metrics |= {f"val/{name}/{metric}": value for metric, value in found.items()}
            if greedy.any():
                metrics[f"val/{name}/greedy"] = float(_problems(rows[greedy]).pass_rates.mean())
        return metrics


def _occurrences(index: Sequence[int]) -> list[int]:
    """How often each element stands before its own place."""
    seen: Counter[int] = Counter()
    found = []
    for element in index:
        found.append(seen[element])
        seen[element] += 1
    return found


def _column(rows: Tensor, name: str) -> Tensor:
    return rows[:, _COLUMNS.index(name)]


def _problems(rows: Tensor) -> ProblemTable:
    """The sampled responses `rows`, problem by problem."""
    places: dict[tuple[float, float], list[int]] = {}
    keys = zip(_column(rows, "dataset").tolist(), _column(rows, "problem").tolist(), strict=True)
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    groups = [rows[found] for found in places.values()]
    return ProblemTable(
        rewards=[_column(group, "reward") for group in groups],
        answers=[_column(group, "answer") for group in groups],
        confidences=[_column(group, "confidence") for group in groups],
        values=torch.stack([_column(group, "value")[0] for group in groups]),
    )


@dataclass(frozen=True)
class ProblemTable:
    """The sampled responses with a verdict of a data set's `M` problems, `n` of each; `n` may differ."""

    rewards: list[Tensor]  # M, [n] each, float64, in the order of row and sample
    answers: list[Tensor]  # M, [n] each: `answer_key` of the responses
    confidences: list[Tensor]  # M, [n] each: the policy's in its responses; NaN where nobody asked, or it has none
    values: Tensor  # [M], the critic's V; NaN without a critic

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def k(self) -> int:
        """Responses of the problem that has the most."""
        return max(len(rewards) for rewards in self.rewards)

    @property
    def pass_rates(self) -> Tensor:
        """`[M]`: mean reward of each problem."""
        return torch.stack([rewards.mean() for rewards in self.rewards])

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k, mean over the problems."""
        return sum(pass_at_k(rewards, k) for rewards in self.rewards) / len(self)

    def majority(self) -> float | None:
        """Reward of the majority's answer, mean over the problems; None where no response gives an answer."""
        if all(answers.isnan().all() for answers in self.answers):
            return None  # as where a verifier reads whole responses
        pairs = zip(self.answers, self.rewards, strict=True)
        return sum(majority_vote(answers, rewards)[1] for answers, rewards in pairs) / len(self)

    def agreement(self) -> tuple[Tensor, Tensor] | None:
        """Share of the responses that give the majority's answer, and its reward, of problems with two or more.

        `[m]` each; 0 for a problem without any answer. None where there is no such problem, or no majority.
        """
        pairs = [pair for pair in zip(self.answers, self.rewards, strict=True) if len(pair[0]) > 1]
        if all(answers.isnan().all() for answers, _ in pairs):
            return None
        shares, rewards = zip(*(majority_vote(*pair) for pair in pairs), strict=True)
        return torch.tensor(shares, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)

    def critic(self, bins: int = 10) -> dict[str, float]:
        """`critic_metrics` of V against the pass rates, without their prefix; nothing without a critic."""
        if self.values.isnan().any():
            return {}
        metrics = critic_metrics(self.values, self.pass_rates, bins)
        return {name.removeprefix("critic/"): float(value) for name, value in metrics.items()}

    def metrics(self) -> dict[str, float]:
        """What is logged of a data set, by the name's last part."""
        found = {f"avg@{self.k}": float(self.pass_rates.mean()), f"pass@{self.k}": self.pass_at(self.k)}
        if (majority := self.majority()) is not None:
            found[f"maj@{self.k}"] = majority
        if critic := self.critic():
            found["value_mean"] = float(self.values.mean())
            found |= {f"critic_{name}": value for name, value in critic.items()}
        return found


def pass_at_k(rewards: Tensor, k: int) -> float:
    """Unbiased chance that one of `k` draws from these responses succeeds: `1 − C(n−c, k) / C(n, k)`.

    `rewards` `[n]`; a response counts as a success at 1.0. Source: Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    n, successes = len(rewards), int((rewards >= 1.0).sum())
    return 1.0 - comb(n - successes, min(k, n)) / comb(n, min(k, n))


def majority_vote(answers: Tensor, rewards: Tensor) -> tuple[float, float]:
    """The share of the responses that give the most frequent answer, and their mean reward; 0 and 0 without one.

    Of several such answers it is the one that came first. `answers` `[n]` hold equal numbers for equal answers, and
    NaN for responses without one, which do not vote; `rewards` `[n]`.
    Source: Wang et al. 2022, arXiv 2203.11171 (self-consistency).
    """
    votes = Counter(answers[~answers.isnan()].tolist())
    if not votes:
        return 0.0, 0.0
    winner, count = votes.most_common(1)[0]  # which keeps the order of first appearance among equals
    return count / len(answers), float(rewards[answers == winner].mean())


def wilson_interval(rate: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval, 95 % by default, of a share `rate` in [0, 1] of `count` independent trials.

    Source: Wilson 1927; `z` is the normal distribution's quantile. From no trial, everything is possible.
    """
    if not count:
        return 0.0, 1.0
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def metric_rows(metrics: Mapping[str, float]) -> list[list[str]]:
    """The metrics `val/<data set>/<kind>` as text: headings, then a row per kind; a column per set, "all" last."""
    cells = {tuple(name.split("/", 1)[1].rsplit("/", 1)): value for name, value in metrics.items()}
    names = sorted(dict.fromkeys(name for name, _ in cells), key=lambda name: name == "all")
    rows = [["metric", *names]]
    for kind in dict.fromkeys(kind for _, kind in cells):
        values = [cells.get((name, kind)) for name in names]
        rows.append([kind, *("–" if value is None else f"{value:.3f}" for value in values)])
    return rows


def metric_table(metrics: Mapping[str, float], title: str) -> Table:
    """`metric_rows` for a terminal."""
    headings, *rows = metric_rows(metrics)
    table = Table(title=title, title_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


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
