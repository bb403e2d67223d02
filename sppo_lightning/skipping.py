"""Updates with a number that is not finite: found before the optimizer moves, skipped, and kept to look at."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sppo_lightning.batch import Prompt, Rollouts, moved
from sppo_lightning.errors import InputError
from sppo_lightning.folders import run_folder, save_to_go_on_from
from sppo_lightning.functional.masking import keep
from sppo_lightning.meter import Meter
from sppo_lightning.ranks import gather_objects, rank_and_ranks

DUMPS = 10  # that each rank keeps, the newest
_NAMED = 8  # prompts in a message


class Attempt(Meter):
    """What is measured of one update before it is made, and what of it must be finite.

    Args:
        rollouts: What the policy learns from, on this rank.
        old_log_probs: `[N, T]`, nats, in the ratio's denominator; None where they are the current ones.
        **learned_from: What else goes with the rows, `[N]` or `[N, T]`; None for what there is not.
    """

    def __init__(
        self, rollouts: Rollouts, old_log_probs: Tensor | None = None, **learned_from: Tensor | None
    ) -> None:
        super().__init__()
        self.rollouts = rollouts
        self.old_log_probs = old_log_probs
        self.learned_from = {name: value for name, value in learned_from.items() if value is not None}
        self.log_probs = torch.zeros_like(rollouts.sampled_log_probs)  # [N, T], of the policy where it was asked
        self.losses: list[tuple[str, Tensor, Sequence[Prompt]]] = []

    def check(self, name: str, loss: Tensor, prompts: Sequence[Prompt]) -> None:
        """The update needs this part of a loss, a scalar over `prompts`, to be finite."""
        self.losses.append((name, loss.detach(), prompts))

    def check_log_probs(self, index: Sequence[int], log_probs: Tensor, mask: Tensor) -> None:
        """The update needs these log-probabilities `[n, T]` of the rows at `index` to be finite on the mask.

        A ratio is clamped, and so is its loss: an infinite log-probability leaves both of them finite.
        """
        self.log_probs[index] += keep(log_probs.detach(), mask).to(self.log_probs)

    def not_finite(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By metric name, 1.0 where this rank has a number that is not finite.

        All ranks have the same names, in the same order. `norms` are those of the modules' gradients.
        """
        sums = {"policy/log_prob": self.log_probs.sum()}
        if self.old_log_probs is not None:
            sums["policy/old_log_prob"] = keep(self.old_log_probs, self.log_probs != 0).sum()
        for name, loss, _ in self.losses:
            sums[name] = sums[name] + loss if name in sums else loss
        sums |= {f"{name}/grad_norm": norm.to(self.log_probs.device) for name, norm in norms.items()}
        return {name: (~value.isfinite()).float() for name, value in sums.items()}

    def suspects(self) -> list[tuple[str, int]]:
        """Data set and row of the prompts with a number that is not finite.

        Where no row's own numbers tell, all prompts of the losses that are not finite.
        """
        tables = [self.log_probs, *(value for value in self.learned_from.values() if value.is_floating_point())]
        taught = self.learned_from.get("verdicts", torch.ones(len(self.rollouts), device=self.log_probs.device))
        bad = torch.stack([~table.reshape(len(table), -1).isfinite().all(dim=1) for table in tables]).any(dim=0)
        prompts = [self.rollouts.prompts[row] for row in (bad & taught.bool()).nonzero().flatten().tolist()]
        if not prompts:
            prompts = [p for _, loss, owners in self.losses if not loss.isfinite() for p in owners]
        return list(dict.fromkeys(prompt.key for prompt in prompts))

    def plain(self) -> dict[str, Any]:
        """All of it on the CPU, in types that `torch.load` reads without the right to run code."""
        kept = vars(self.rollouts) | moved(self.rollouts, "cpu")
        rows = [{name: getattr(p, name) for name in ("text", "gold", "dataset", "row")} for p in kept["prompts"]]
        kept |= {"prompts": rows, "scores": {name: s.values.cpu() for name, s in kept["scores"].items()}}
        own = self.learned_from | {"log_probs": self.log_probs}
        own |= {} if self.old_log_probs is None else {"old_log_probs": self.old_log_probs}
        return kept | {name: value.cpu() for name, value in own.items()}


class SkippedUpdates:
    """Lets an update through or skips it, on all ranks alike, counts those skipped, and says when to stop.

    Args:
        most_in_a_row: After so many the run stops; None for never.
    """

    def __init__(self, most_in_a_row: int | None) -> None:
        if most_in_a_row is not None and most_in_a_row < 1:
            raise InputError(
                f"`max_skipped_updates`={most_in_a_row} would stop a run that is well; use 1 to stop at the first "
                "update that is skipped, or null to go on whatever happens."
            )
        self.most_in_a_row = most_in_a_row
        self.in_a_row = 0  # over iterations
        self.total = 0
        self.lately = 0  # not logged yet
        self._reason = ""
        self._dumps: list[str] = []  # of this rank, the newest last
        self._last_dump = ""  # of any rank

    @property
    def are_too_many(self) -> bool:
        """Whether the run should stop."""
        return self.most_in_a_row is not None and self.in_a_row >= self.most_in_a_row

    def lets_through(self, attempt: Attempt, norms: Mapping[str, Tensor], trainer: Trainer) -> bool:
        """Whether all that the update needs is finite on every rank; a collective.

        Where something is not, the skipped update is counted, warned about and written to disk.

        Args:
            attempt: This rank's part of the update.
            norms: Of each module's gradient before clipping, over all ranks.
            trainer: Whose run it is.
        """
        flags = attempt.not_finite(norms)
        own = torch.stack(list(flags.values()))
        everywhere = trainer.strategy.reduce(own.clone(), reduce_op="sum")
        own_counts, counts = torch.stack([own, everywhere]).tolist()  # the update's one synchronisation
        wrong = [name for name, count in zip(flags, counts, strict=True) if count]
        if not wrong:
            self.in_a_row = 0
            return True
        self.in_a_row, self.total, self.lately = self.in_a_row + 1, self.total + 1, self.lately + 1
        found_here = [name for name, count in zip(flags, own_counts, strict=True) if count]
        # a gradient is of all ranks, so it accuses this one only where no rank's own numbers do
        if any(not name.endswith("/grad_norm") for name in wrong):
            found_here = [name for name in found_here if not name.endswith("/grad_norm")]
        folder = os.path.join(run_folder(trainer), "skipped_updates")
        file = self._dump(attempt, wrong, folder, trainer.global_step) if found_here else ""
        self._tell(wrong, gather_objects((file, attempt.suspects() if found_here else [])), trainer.global_step)
        return False

    def _dump(self, attempt: Attempt, wrong: list[str], folder: str, step: int) -> str:
        """Write this rank's part of the update; only the newest files stay."""
        rank, _ = rank_and_ranks()
        file = os.path.join(folder, f"step-{step}-skipped-{self.total}-rank-{rank}.pt")
        content = {"not_finite": wrong, "global_step": step, "rank": rank}
        TorchCheckpointIO().save_checkpoint(attempt.plain() | content, file)
        self._dumps.append(file)
        if len(self._dumps) > DUMPS:
            get_filesystem(folder).rm(self._dumps.pop(0))
        return file

    def _tell(self, wrong: list[str], found: list[tuple[str, list[tuple[str, int]]]], step: int) -> None:
        """Warn once, of what all ranks found."""
        self._last_dump = next(file for file, _ in found if file)
        self._reason = f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite"
        suspects = list(dict.fromkeys(each for _, rows in found for each in rows))
        named = ", ".join(f"row {row} of {dataset!r}" for dataset, row in suspects[:_NAMED])
        if len(suspects) > _NAMED:
            named += f" and {len(suspects) - _NAMED} more"
        rank_zero_warn(
            f"The update after update {step} was skipped, because {self._reason}"
            f"{f' with {named}' if named else ''}; its mini-batch is in {self._last_dump} ({self.in_a_row} skipped "
            f"in a row, {self.total} in all)."
        )

    def stop_if_too_many(self, trainer: Trainer) -> None:
        """End the run where it should stop, with a checkpoint; asked on every rank."""
        if not self.are_too_many:
            return
        file = save_to_go_on_from(trainer, f"skipped-step={trainer.global_step}.ckpt", run_folder(trainer))
        raise InputError(
            f"{self.in_a_row} updates in a row were skipped, which ends the run where "
            f"`max_skipped_updates`={self.most_in_a_row}: {self._reason}, see {self._last_dump}; try a lower `lr`, "
            "another `trainer.precision` (bf16-mixed, 32-true) or another model, and go on with `--ckpt_path "
            f"{file}`, which has the weights of the last good update, or with an earlier one."
        )

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where a checkpoint was saved."""
        self.in_a_row, self.total = state_dict["in_a_row"], state_dict["total"]
