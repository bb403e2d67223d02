"""Whether the critic knows what it talks about: V against the pass rates of held-out problems."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure

from sppo_lightning.calibration import reliability_bins
from sppo_lightning.callbacks.held_out_calibration import HeldOutCalibration, overall
from sppo_lightning.evaluation import ProblemTable
from sppo_lightning.figures import calibration_figure


class CriticCalibration(HeldOutCalibration):
    """Draws V against the pass rates of held-out problems, and warns where their mean would be the better critic.

    Writes `calibration.png`, a reliability diagram over the problems of all validation sets, and
    `calibration.json`, its bins and metrics for each of them; the figure also goes to TensorBoard as
    `critic/calibration`. It costs nothing but the drawing: the validation has sampled and asked the critic. The
    more samples per prompt a validation has, the less of the distance from V is the pass rates' own noise.

    Warns when the Brier skill falls below 0, and again only after it was above; not before the first update.

    Args:
        path: Folder of the two files; made where it is missing.
        bins: Bins of V, of equal width on [0, 1].
        every_n_validations: Validations from one drawing to the next; the first has one, and so has the last of
            a `fit`.
    """

    file_name: ClassVar[str] = "calibration"
    tag: ClassVar[str] = "critic/calibration"

    def __init__(self, path: str = "runs/calibration", bins: int = 10, every_n_validations: int = 1) -> None:
        super().__init__(path, bins, every_n_validations)
        self._is_worse = False  # than the mean, at the last validation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say so where there is nothing to draw."""
        if getattr(pl_module, "critic", None) is None:
            rank_zero_info("CriticCalibration draws nothing: the model has no critic.")

    def state_dict(self) -> dict[str, Any]:
        """The count of validations, and whether a warning is out."""
        return {"validations": self.validations, "is_worse": self._is_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        self.validations, self._is_worse = state_dict["validations"], state_dict["is_worse"]

    def problems(self, module: LightningModule) -> dict[str, ProblemTable]:
        """Only those that a critic has seen."""
        found = super().problems(module)
        return {name: table for name, table in found.items() if not table.values.isnan().any()}

    def note(self, trainer: Trainer, problems: dict[str, ProblemTable]) -> None:
        """Warn when the critic has become worse than the mean pass rate."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step == 0:
            return  # nobody expects foresight of a critic that has not learned anything
        table = overall(problems)
        metrics = table.critic(self.bins)
        skill = metrics.get("brier_skill")
        if skill is None:
            return
        if skill < 0 and not self._is_worse:
            rank_zero_warn(
                f"The critic foresees outcomes worse than the mean pass rate alone does: Brier skill {skill:.2f}, "
                f"squared error {metrics['brier']:.3f} on {len(table)} held-out problems{self._when}. "
                "Advantages R − V are then noisier than with a constant for V. Raise the critic's learning rate "
                "(`model.critic_optimizer.lr`), warm the critic up before the policy learns from it, or use the "
                "batch mean as the baseline in its place."
            )
        self._is_worse = skill < 0

    def report(self, problems: dict[str, ProblemTable]) -> dict[str, Any]:
        """The content of `calibration.json`."""
        data_sets = {name: self.describe(table) for name, table in problems.items()}
        return {"iteration": self._iteration, "data_sets": data_sets}

    def figure(self, problems: dict[str, ProblemTable]) -> Figure:
        """V against pass rates, of all problems."""
        values, rates = overall(problems).values.numpy(), overall(problems).pass_rates.numpy()
        return calibration_figure(values, rates, self.bins, f"Critic calibration{self._when}")

    def describe(self, problems: ProblemTable) -> dict[str, Any]:
        """What `calibration.json` says of the problems of a data set."""
        bins = reliability_bins(problems.values, problems.pass_rates, self.bins)
        return {
            "problems": len(problems),
            "samples_per_problem": problems.k,
            "value_mean": float(problems.values.mean()),
            "pass_rate_mean": float(problems.pass_rates.mean()),
            **problems.critic(self.bins),
            "bins": [asdict(b) for b in bins],
        }
