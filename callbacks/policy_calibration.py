"""Whether the policy still knows what it knows: its confidence in its own answers against their rewards."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure

from sppo_lightning.calibration import confidence_metrics, reliability_bins
from sppo_lightning.callbacks.held_out_calibration import HeldOutCalibration, overall
from sppo_lightning.confidence import Pair, PolicyConfidence
from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import ProblemTable
from sppo_lightning.figures import confidence_figure

_NOTHING = {  # why a kind of confidence is missing, and the way out
    "agreement": (
        "no agreement: no problem of the validation has two responses, or none of these an answer; set "
        "`validation.samples_per_prompt` of RolloutGeneration to 2 or more, or do without."
    ),
    "token_probability": (
        "no token probability: no response of the validation has an answer that is found among its tokens; set "
        "`tokens` to response, which counts all of them, or do without."
    ),
}


class PolicyCalibration(HeldOutCalibration):
    """Draws two confidences of the policy in its own answers against their rewards, before training and now.

    Agreement is the share of a problem's responses that give the majority's answer, and its outcome the reward of
    that answer. Token probability is the mean probability of a response's tokens, and its outcome the response's
    reward. For both: reliability diagram, risk-coverage curve, and the metrics `val/<data set>/agreement_…` and
    `…/token_probability_…`. It costs nothing but finding the answers' tokens and the drawing: the validation has
    sampled.

    Writes `policy_calibration.png` over all validation sets, which is also TensorBoard's `policy/calibration`, and
    `policy_calibration.json` with the metrics of each set at each validation. "Before" is the first validation,
    so add `InitialValidation` to the callbacks for one that deserves the name.

    Args:
        path: Folder of the two files; made where it is missing.
        tokens: Whose probability: `answer`, the tokens that hold the final answer, while a response without one is
            left out; `response`, all tokens.
        bins: Bins of the confidences on [0, 1].
        every_n_validations: Validations from one drawing to the next; the first has one, and so has the last of
            a `fit`.
    """

    file_name: ClassVar[str] = "policy_calibration"
    tag: ClassVar[str] = "policy/calibration"

    def __init__(
        self,
        path: str = "runs/calibration",
        tokens: Literal["answer", "response"] = "answer",
        bins: int = 10,
        every_n_validations: int = 1,
    ) -> None:
        super().__init__(path, bins, every_n_validations)
        if tokens not in ("answer", "response"):
            raise InputError(
                f"`PolicyCalibration.tokens`={tokens!r} is no part of a response; use answer or response."
            )
        self.tokens: Literal["answer", "response"] = tokens
        self.history: list[dict[str, Any]] = []  # one row per validation
        self._before: dict[str, Pair] = {}  # of all problems of the first of them
        self._confidence: PolicyConfidence | None = None
        self._missing: set[str] = set()  # kinds of which it was said that there is nothing to draw

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the validation keep the policy's confidence."""
        self._confidence = PolicyConfidence(pl_module.policy, self.tokens, self.bins)  # type: ignore[arg-type]
        pl_module.evaluation.confidence = self._confidence  # type: ignore[union-attr]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have it no longer."""
        pl_module.evaluation.confidence = None  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """All validations' numbers, and what the first one's curves are drawn from."""
        return {
            "validations": self.validations,
            "tokens": self.tokens,
            "history": list(self.history),
            "before": dict(self._before),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        if state_dict["tokens"] != self.tokens:
            rank_zero_warn(
                f"`PolicyCalibration.tokens`={self.tokens} cannot be compared with the checkpoint's "
                f"{state_dict['tokens']}: its history starts anew with the next validation."
            )
            return
        self.validations, self.history = state_dict["validations"], state_dict["history"]
        self._before = state_dict["before"]

    def note(self, trainer: Trainer, problems: dict[str, ProblemTable]) -> None:
        """Add the validation to the history, and say which confidence the policy has none of."""
        pairs = self._pairs(overall(problems))
        for kind, reason in _NOTHING.items():
            if kind not in pairs and kind not in self._missing:
                self._missing.add(kind)
                rank_zero_info(f"PolicyCalibration draws {reason}")
        # a resumed run may repeat the validation at which it was saved
        self.history = [
            row for row in self.history if self._iteration is None or row["iteration"] != self._iteration
        ]
        if not self.history:
            self._before = pairs
        data_sets = {name: self.describe(table) for name, table in problems.items()}
        self.history.append({"iteration": self._iteration, "data_sets": data_sets})

    def report(self, problems: dict[str, ProblemTable]) -> dict[str, Any]:
        """The content of `policy_calibration.json`."""
        ends = {"before": self._before, "now": self._pairs(overall(problems))}
        reliability = {
            end: {kind: [asdict(b) for b in reliability_bins(*pair, self.bins)] for kind, pair in pairs.items()}
            for end, pairs in ends.items()
        }
        return {"tokens": self.tokens, "validations": self.history, "bins": reliability}

    def figure(self, problems: dict[str, ProblemTable]) -> Figure | None:
        """Both confidences of all problems, with those before training unless these are them."""
        pairs = self._pairs(overall(problems))
        if not pairs:
            return None
        moments = {}
        if len(self.history) > 1:
            first = self.history[0]["iteration"]
            moments["before training" if first == 0 else "first validation"] = self._before
        now = "this validation" if self._iteration is None else f"iteration {self._iteration}"
        moments["before training" if self._iteration == 0 else now] = pairs
        return confidence_figure(moments, self.tokens, self.bins)

    def describe(self, problems: ProblemTable) -> dict[str, dict[str, float]]:
        """The metrics of a data set by kind of confidence, and how many confidences there are."""
        return {
            kind: {"count": len(pair[0]), **confidence_metrics(*pair, self.bins)}
            for kind, pair in self._pairs(problems).items()
        }

    def _pairs(self, problems: ProblemTable) -> dict[str, Pair]:
        assert self._confidence is not None
        return self._confidence.pairs(problems)
