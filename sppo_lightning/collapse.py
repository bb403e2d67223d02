"""When a run collapses: rules over windows of figures that are logged anyhow, each with its causes and ways out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from sppo_lightning.errors import InputError
from sppo_lightning.verification.drift import Series

_MOSTLY = 0.8  # of a window's iterations; a critic without skill, below 0 as often as above, does not reach it


@dataclass(frozen=True)
class CollapseLimits:
    """Where the mean of a figure over a window is a symptom; null for never.

    Args:
        min_entropy: The policy's entropy per token is below this, in nats.
        entropy_share: It is below this share of what it was over the first window.
        length_share: Responses are shorter than this share of what they were over the first window.
        length_growth: They are longer than this multiple of it.
        truncated_fraction: A larger share of the responses is cut off.
        clip_fraction: A larger share of the tokens has a clipped ratio. It is a mean over an iteration's updates,
            of which the first has nothing to clip: of two updates it is at most 0.5.
        brier_skill: The critic's skill is below this in four of five iterations; 0 is as good as the batch mean.
    """

    min_entropy: float | None = 0.02
    entropy_share: float | None = 0.2
    length_share: float | None = 0.3
    length_growth: float | None = 4.0
    truncated_fraction: float | None = 0.5
    clip_fraction: float | None = 0.4
    brier_skill: float | None = 0.0

    def __post_init__(self) -> None:
        ends = {"min_entropy": (0, math.inf), "length_growth": (1, math.inf), "brier_skill": (-math.inf, 1)}
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), ends.get(field.name, (0, 1))
            if value is not None and not low < value < high:
                allowed = " and ".join(
                    [f"above {low}"] * math.isfinite(low) + [f"below {high}"] * math.isfinite(high)
                )
                raise InputError(
                    f"`CollapseMonitor.limits.{field.name}`={value} would warn of nothing, or of everything; use a "
                    f"number {allowed}, or null for no warning."
                )


class _Rule(NamedTuple):
    """A symptom: where it shows, when it is there, what it looks like, where it comes from and what helps."""

    symptom: str
    metric: str
    is_there: Callable[[float, float, CollapseLimits], bool]  # by the mean over the last window and over the first
    seen: str
    causes: str
    ways_out: str


_MEAN = "has a mean of {now:.3g} over the last {window} iterations, from {first:.3g} over the first {window}"
_FASTER = "a learning rate that is too high"

RULES = (
    _Rule(
        "entropy_collapse",
        "policy/entropy",
        lambda now, first, limits: now < max(limits.min_entropy or 0, (limits.entropy_share or 0) * first),
        f"the policy hardly explores any more: `policy/entropy` (nats) {_MEAN}",
        f"{_FASTER}, too few prompts that are seen too often, or one response that pleases the verifier everywhere",
        "a lower `model.policy_optimizer.lr`, a penalty such as `model.kl_coef`=0.001, a higher `clip_high` of "
        "`model.objective` (DAPO: 0.28), or a higher `sampling.temperature`",
    ),
    _Rule(
        "length_collapse",
        "rollout/response_tokens_mean",
        lambda now, first, limits: now < (limits.length_share or 0) * first,
        f"responses have become short: `rollout/response_tokens_mean` {_MEAN}",
        "guesses that are paid for, a length penalty that outweighs being right, or an end of sequence that the "
        "policy has learned to give at once",
        "a look at the responses (SampleLog), a smaller `weight` of LengthPenalty or `only_if_correct`, a lower "
        "`model.policy_optimizer.lr`, and HackingMonitor",
    ),
    _Rule(
        "length_explosion",
        "rollout/response_tokens_mean",
        lambda now, first, limits: now > (limits.length_growth or math.inf) * first,
        f"responses have become long: `rollout/response_tokens_mean` {_MEAN}",
        "repetition, length that is paid for, or an end of sequence that is never rewarded",
        "a look at the responses (SampleLog), LengthPenalty, `truncated: unanswered` of the verifiers, or a lower "
        "`model.policy_optimizer.lr`",
    ),
    _Rule(
        "truncation",
        "rollout/truncated_fraction",
        lambda now, first, limits: now > (limits.truncated_fraction or 1),
        f"many responses are cut off: `rollout/truncated_fraction` {_MEAN}",
        "`sampling.max_new_tokens` too small for the prompts, repetition, or a chat template without its end of "
        "sequence",
        "a larger `sampling.max_new_tokens`, LengthPenalty with DAPO's overlong buffer, or `truncated: unanswered` "
        "of the verifiers",
    ),
    _Rule(
        "all_zero",
        "reward/mean",
        lambda now, first, limits: now == 0,
        "there is nothing to learn from: `reward/mean` is 0 in each of the last {window} iterations",
        "prompts that are too hard, answers in a form that the verifier cannot read, wrong golds, or responses "
        "that are cut off before their answer",
        "a look at responses and scores (SampleLog), a warm start (SFTModule), easier prompts, or a larger "
        "`sampling.max_new_tokens`",
    ),
    _Rule(
        "all_one",
        "reward/mean",
        lambda now, first, limits: now == 1,
        "there is nothing left to learn: `reward/mean` is 1 in each of the last {window} iterations",
        "prompts that are too easy, or a verifier that takes anything",
        "harder prompts, and HackingMonitor with a stricter verifier among its `checks`",
    ),
    _Rule(
        "clipping",
        "policy/clip_fraction",
        lambda now, first, limits: now > (limits.clip_fraction or 1),
        f"updates leave the clip range at once: `policy/clip_fraction` {_MEAN}",
        f"{_FASTER}, too many updates per iteration, or a sampler that disagrees with the trainer "
        "(`sampler/logprob_gap`)",
        "a lower `model.policy_optimizer.lr`, a larger `model.mini_batch_size`, a wider range of "
        "`model.objective`, or `model.recompute_old_log_probs`=true",
    ),
    _Rule(
        "critic_skill",
        "critic/brier_skill",
        lambda now, first, limits: now >= _MOSTLY,
        "the critic foresees less than the mean reward does: `critic/brier_skill` is below its limit in {now:.0%} "
        "of the last {window} iterations, and advantages R − V are noisier than with a constant for V",
        "a critic that learns too slowly or too fast, or a policy that moves away from what it has learned",
        "another `model.critic_optimizer.lr`, `model.critic_warmup`, a lower `model.policy_optimizer.lr`, or "
        "BatchMeanAdvantage in place of the critic",
    ),
)


class Collapse:
    """Looks for symptoms after each iteration, and tells of each once until it has gone.

    It has gone when a whole window of iterations in a row was without it.

    Args:
        windows: Iterations that are looked at together, by metric.
        limits: Where a mean is a symptom.
    """

    def __init__(self, windows: Mapping[str, int], limits: CollapseLimits) -> None:
        self.limits = limits
        self.series = {metric: Series(window) for metric, window in windows.items()}
        self.present: dict[str, int] = {}  # symptoms that were told of, and since how many iterations they are away

    def observe(self, figures: Mapping[str, float]) -> list[str]:
        """Note an iteration's figures, by metric; a sentence on each new symptom.

        A figure that is missing or not finite says nothing about the iteration.
        """
        told = []
        for metric, series in self.series.items():
            value = figures.get(metric, math.nan)
            if math.isfinite(value):
                series.add(self._entry(metric, value), 1)
                told += [self._sentence(rule) for rule in RULES if rule.metric == metric and self._is_new(rule)]
        return told

    def _entry(self, metric: str, value: float) -> float:
        """What means are taken of: of a skill, which has no lower bound, only whether it is below its limit."""
        if metric != "critic/brier_skill":
            return value
        return float(self.limits.brier_skill is not None and value < self.limits.brier_skill)

    def _is_new(self, rule: _Rule) -> bool:
        series = self.series[rule.metric]
        if series.recent is None or series.first is None:
            return False
        was_present = rule.symptom in self.present
        if rule.is_there(series.recent, series.first, self.limits):
            self.present[rule.symptom] = 0
            return not was_present
        if was_present:
            self.present[rule.symptom] += 1
            if self.present[rule.symptom] >= series.window:
                del self.present[rule.symptom]
        return False

    def _sentence(self, rule: _Rule) -> str:
        series = self.series[rule.metric]
        seen = rule.seen.format(now=series.recent, first=series.first, window=series.window)
        return f"{seen}. It often comes from {rule.causes}. Try {rule.ways_out}."

    def state_dict(self) -> dict[str, Any]:
        """The windows, and what was told of."""
        return {
            "series": {metric: series.state_dict() for metric, series in self.series.items()},
            "present": dict(self.present),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved."""
        for metric, saved in state_dict["series"].items():
            self.series[metric].load_state_dict(saved)
        self.present = dict(state_dict["present"])
