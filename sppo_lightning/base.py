"""What supervised and reinforcement learning share: the policy, and the pipeline outside training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import rich
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from sppo_lightning.batch import PromptBatch
from sppo_lightning.batching import MicroRows, micro_batches
from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import Evaluation, metric_table
from sppo_lightning.memory import peak_memory
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.same_weights import check_same_weights
from sppo_lightning.models.sharding import is_sharded, settle_mesh, shard, whole
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.pipeline import check_requirements

_REPLACED = {  # trainer settings that manual optimization ignores, and what does their work here
    "gradient_clip_val": "max_grad_norm` of `model.policy_optimizer` and `model.critic_optimizer",
    "accumulate_grad_batches": "micro_batch_tokens` on `model",
}


class PolicyModule(LightningModule):
    """A LightningModule with a policy; validates, tests and predicts through the pipeline's stages.

    `phase_seconds` holds the seconds of the current iteration by phase, which stages add to.
    """

    automatic_optimization = False
    micro_batch_tokens: int  # token budget of one forward and backward on one rank, padding included
    needs_in_fit: frozenset[str] = frozenset()  # what the stages must provide for `training_step`

    def __init__(self, policy: CausalLMPolicy) -> None:
        super().__init__()
        self.policy = policy
        self.evaluation = Evaluation()
        self.phase_seconds: dict[str, float] = {}
        self.last_phase_seconds: dict[str, float] = {"rollout": 0.0, "verify": 0.0, "update": 0.0}

    def configure_callbacks(self) -> list[Callback]:
        """None; but it is the one hook before Lightning's own check, whose message knows no way out."""
        for name, instead in _REPLACED.items():
            value = getattr(self.trainer, name, None)
            if value not in (None, 0, 0.0) and not (name == "accumulate_grad_batches" and value == 1):
                raise InputError(
                    f"`trainer.{name}`={value} does not apply here; remove it and set `{instead}` instead."
                )
        if self.micro_batch_tokens < 1:
            raise InputError(f"`micro_batch_tokens`={self.micro_batch_tokens} holds no row; use 1 or more.")
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise InputError(
                f"`trainer.precision`={self.trainer.precision} multiplies gradients by a scale that "
                "`max_grad_norm` would take for their size; use bf16-mixed."
            )
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            settle_mesh(self.trainer.strategy, self.trainer.num_devices * self.trainer.num_nodes)
        return []

    def setup(self, stage: str) -> None:
        """Check that the stages provide what this stage of the run needs."""
        needs = self.needs_in_fit if stage == "fit" else frozenset({"rollouts", "scores"})
        if stage == "predict":
            needs = frozenset({"rollouts"})
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        check_requirements(needs, callbacks, callbacks, "the module")

    def configure_model(self) -> None:
        """Load the weights, and shard them where the strategy says so; called by Lightning before all else."""
        self.build_models()
        if self._trainer is None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        for model in self.models():
            if not is_sharded(model):
                shard(model, self.device_mesh["data_parallel"])  # type: ignore[index]

    def build_models(self) -> None:
        """Load the weights; a second call does nothing."""
        self.policy.build()

    def models(self) -> list[nn.Module]:
        """Those with weights of their own, each of which is sharded by itself."""
        return [self.policy]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, before its weights are loaded."""
        if "state_dict" in checkpoint:  # sharded ones are loaded by themselves
            check_same_weights(self, checkpoint["state_dict"], str(self.trainer.ckpt_path))

    def end_iteration(self, update_seconds: float) -> None:
        """Log the phases' seconds, which start anew, and the peaks of memory, of the rank that needs most."""
        seconds = {"rollout": 0.0, "verify": 0.0, **self.phase_seconds, "update": update_seconds}
        total = max(sum(seconds.values()), 1e-9)
        self.log_dict({f"time/{phase}": value for phase, value in seconds.items()})
        self.log_dict({f"time/{phase}_share": value / total for phase, value in seconds.items()})
        peaks = peak_memory()
        largest = torch.tensor(list(peaks.values()), device=self.device)
        largest = self.trainer.strategy.reduce(largest, reduce_op="max")
        self.log_dict({f"memory/{name}": value for name, value in zip(peaks, largest.tolist(), strict=True)})
        self.last_phase_seconds, self.phase_seconds = seconds, {}

    def step_optimizer(self, modules: dict[str, tuple[nn.Module, GroupOptimizer]]) -> dict[str, Tensor]:
        """Clip each module's gradient, take one step, advance the schedule; the norms before clipping.

        A parameter group that is not among `modules` stays as it is.
        """
        norms = {
            name: whole(nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm))
            for name, (module, settings) in modules.items()
        }
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            if group["name"] not in modules:
                for parameter in group["params"]:
                    parameter.grad = None  # a gradient of zero would still decay the weights
        optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        return norms

    def in_step(self, *groupings: Sequence[list[int]]) -> Iterator[tuple[list[MicroRows], float, bool]]:
        """One backward (or forward) after the other, as many on every rank, for collectives to meet.

        Yields for each a group of rows out of every grouping (a rank or a grouping that is done goes on with a row
        that is masked), 1 / (how many there are over all ranks), and whether it is the last.
        """
        own = max([1, *map(len, groupings)])
        most = int(self.trainer.strategy.reduce(torch.tensor(own, device=self.device), reduce_op="max"))
        for i in range(most):
            rows = [MicroRows(g[i], True) if i < len(g) else MicroRows([0], False) for g in groupings]
            yield rows, 1.0 / (most * self.trainer.world_size), i == most - 1

    def policy_groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Positions into `lengths`, in tokens, in groups within the budget of one of the policy's forwards."""
        return micro_batches(lengths, self.micro_batch_tokens, self.policy.packs)

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; ranks exchange gradients with the `last` one of a mini-batch only.

        Losses are shares of the mini-batch over all ranks, so gradients add up; strategies average them, which
        the factor `world_size` undoes.
        """
        strategy = self.trainer.strategy
        quiet = not last and isinstance(strategy, ParallelStrategy)
        with strategy.block_backward_sync() if quiet else nullcontext():  # type: ignore[attr-defined]
            self.manual_backward(loss * self.trainer.world_size)

    def foreseeing(self, batch: PromptBatch) -> AbstractContextManager[None]:
        """Surrounds the sampling of the batch's responses, for what can be worked out meanwhile."""
        return nullcontext()

    def prompt_values(self, batch: PromptBatch) -> Tensor | None:
        """The critic's chance of success for each prompt, `[B]`; None without a critic."""
        return None

    def _evaluate(self, batch: PromptBatch, dataloader_idx: int) -> None:
        values = self.prompt_values(batch)  # of an empty batch too: a sharded critic needs all ranks
        if not len(batch):
            return  # this rank's share of the last batch is empty
        assert batch.rollouts is not None
        spread = None if values is None else values[batch.rollouts.prompt_index]
        self.evaluation.update(dataloader_idx, batch.rollouts, spread)
        if batch.greedy_rollouts is not None:
            self.evaluation.update(dataloader_idx, batch.greedy_rollouts, values, greedy=True)

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the batch's scored responses."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the batch's scored responses."""
        self._evaluate(batch, dataloader_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing to add: the stages have sampled and scored, and CompletionWriter writes."""

    def on_validation_epoch_end(self) -> None:
        """Log avg@k and pass@k of every validation set."""
        self._report()

    def on_test_epoch_end(self) -> None:
        """Log avg@k and pass@k of every test set."""
        self._report()

    def _report(self) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        loaders = self.trainer.num_val_batches if self.trainer.validating else self.trainer.num_test_batches
        names = getattr(datamodule, "validation_names", None) or [f"set{i}" for i in range(len(loaders))]
        if self.trainer.testing:
            names = getattr(datamodule, "test_names", None) or names
        known = self.trainer.callback_metrics
        for name in [name for name in known if name.startswith("val/")]:
            del known[name]  # or what an earlier validation logged would pass for this one's, where it has none
        metrics = self.evaluation.report(names)
        self.evaluation.reset()
        self.phase_seconds = {}
        self.log_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()})
        if self.trainer.state.fn != TrainerFn.FITTING and self.trainer.is_global_zero and metrics:
            rich.get_console().print(metric_table(metrics, "Test" if self.trainer.testing else "Validation"))
