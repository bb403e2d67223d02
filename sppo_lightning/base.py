"""What supervised and reinforcement learning share: the policy, and the pipeline outside training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, ClassVar

import rich
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from sppo_lightning.batch import PromptBatch
from sppo_lightning.batching import MicroRows, micro_batches
from sppo_lightning.checkpoints import AtomicCheckpointIO
from sppo_lightning.errors import InputError
from sppo_lightning.evaluation import Evaluation, metric_table
from sppo_lightning.memory import peak_memory
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.same_weights import check_same_weights
from sppo_lightning.models.sharding import is_sharded, settle_mesh, shard, whole
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.phases import Watch, phase
from sppo_lightning.pipeline import check_requirements
from sppo_lightning.ranks import gather_objects
from sppo_lightning.record import RunRecord
from sppo_lightning.resuming import ResumableModule
from sppo_lightning.skipping import Attempt, SkippedUpdates

_REPLACED = {  # trainer settings that manual optimization ignores, and what does their work here
    "gradient_clip_val": "max_grad_norm` of `model.policy_optimizer` and `model.critic_optimizer",
    "accumulate_grad_batches": "micro_batch_tokens` on `model",
}


class PolicyModule(ResumableModule):
    """A LightningModule with a policy; validates, tests and predicts through the pipeline's stages.

    `phase_seconds` holds the seconds of the current iteration by phase, which stages add to.
    """

    automatic_optimization = False
    micro_batch_tokens: int  # token budget of one forward and backward on one rank, padding included
    needs_in_fit: frozenset[str] = frozenset()  # what the stages must provide for `training_step`
    imitates: ClassVar[bool] = False  # whether it learns from the rows' demonstrations
    with_state: ClassVar[tuple[str, ...]] = ("skipped_updates",)  # saved, besides the modules

    def __init__(self, policy: CausalLMPolicy, max_skipped_updates: int | None = 5) -> None:
        super().__init__()
        self.policy = policy
        self.skipped_updates = SkippedUpdates(max_skipped_updates)
        self.evaluation = Evaluation()
        self._watch: Watch | None = None
        self.record = RunRecord()
        self.run_config: str | None = None  # the whole config as YAML, where the command line runs it
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
            settle_mesh(self.trainer.strategy, self.trainer.num_devices, self.trainer.num_nodes)
        return []

    def setup(self, stage: str) -> None:
        """Check that the stages provide what this stage of the run needs; let no checkpoint be half-written."""
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit":
            self.record.describe(self.trainer)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        check_requirements(self.needs(stage), callbacks, callbacks, "the module")
        if self.trainer.world_size > 1:
            timeout = getattr(self.trainer.strategy, "_timeout", None) or default_pg_timeout
            self._watch = Watch(timeout.total_seconds(), rank_zero_warn)

    def needs(self, stage: str) -> frozenset[str]:
        """What the stages must provide in this stage of the run."""
        others = {"fit": self.needs_in_fit, "predict": frozenset({"rollouts"})}
        return others.get(stage, frozenset({"rollouts", "scores"}))

    def teardown(self, stage: str) -> None:
        """End what was begun in `setup`."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def configure_model(self) -> None:
        """Load the weights, and shard them where the strategy says so; called by Lightning before all else."""
        self.build_models()
        if self._trainer is None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        for model in self.models():
            if not is_sharded(model):
                assert self.device_mesh is not None
                shard(model, self.device_mesh)

    def build_models(self) -> None:
        """Load the weights; a second call does nothing."""
        self.policy.build()

    def models(self) -> list[nn.Module]:
        """Those with weights of their own, each of which is sharded by itself."""
        return [self.policy]

    def end_iteration(self, samples: int, update_seconds: float) -> None:
        """Count what this rank has learned from; log phases, which start anew, and the largest peaks of memory."""
        over_ranks = self.trainer.strategy.reduce(torch.tensor(samples, device=self.device), reduce_op="sum")
        self.record.count(self.trainer, int(over_ranks))
        seconds = {"rollout": 0.0, "verify": 0.0, **self.phase_seconds, "update": update_seconds}
        total = max(sum(seconds.values()), 1e-9)
        self.log_dict({f"time/{phase}": value for phase, value in seconds.items()})
        self.log_dict({f"time/{phase}_share": value / total for phase, value in seconds.items()})
        peaks = peak_memory()
        largest = torch.tensor(list(peaks.values()), device=self.device)
        largest = self.trainer.strategy.reduce(largest, reduce_op="max")
        self.log_dict({f"memory/{name}": value for name, value in zip(peaks, largest.tolist(), strict=True)})
        self.log("update/skipped", float(self.skipped_updates.lately))
        self.last_phase_seconds, self.phase_seconds, self.skipped_updates.lately = seconds, {}, 0

    def step_optimizer(self, modules: dict[str, tuple[nn.Module, GroupOptimizer]], attempt: Attempt) -> bool:
        """Clip each module's gradient, take one step, advance the schedule; count the norms before clipping.

        A parameter group that is not among `modules` stays as it is. Where a number of the attempt or a norm is not
        finite, on any rank, all stays as it is, and the answer is False.
        """
        norms = {
            name: whole(nn.utils.clip_grad_norm_(module.parameters(), settings.max_grad_norm))
            for name, (module, settings) in modules.items()
        }
        optimizer: Any = self.optimizers()
        if not self.skipped_updates.lets_through(attempt, norms, self.trainer):
            optimizer.zero_grad()
            return False
        for group in optimizer.param_groups:
            if group["name"] not in modules:
                for parameter in group["params"]:
                    parameter.grad = None  # a gradient of zero would still decay the weights
        optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        for name, norm in norms.items():
            attempt.add(f"{name}/grad_norm", norm)
        return True

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

    def groups(self, lengths: Sequence[int], packed: bool = False) -> list[list[int]]:
        """Positions into `lengths`, in tokens, in groups within the budget of one forward.

        Ranks that compute a forward together share its budget, and a group may have no row of this rank; then a
        collective of these ranks.
        """
        together = self.policy.group
        if together is None:
            return micro_batches(lengths, self.micro_batch_tokens, packed)
        each: list[list[int]] = gather_objects(list(lengths), together.get_group())
        joint = micro_batches([n for own in each for n in own], self.micro_batch_tokens, packed)
        start = sum(map(len, each[: together.get_local_rank()]))
        return [[i - start for i in group if 0 <= i - start < len(lengths)] for group in joint]

    def accumulate(self, loss: Tensor, last: bool) -> None:
        """Backward of one micro-batch; ranks exchange gradients with the `last` one of a mini-batch only.

        Losses are shares of the mini-batch over all ranks, so gradients add up; strategies average them, which
        the factor undoes; those of ranks that compute a forward together are summed.
        """
        strategy = self.trainer.strategy
        quiet = not last and isinstance(strategy, ParallelStrategy)
        with strategy.block_backward_sync() if quiet else nullcontext():  # type: ignore[attr-defined]
            together = 1 if self.policy.group is None else self.policy.group.size()
            self.manual_backward(loss * (self.trainer.world_size // together))

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        """Stop here, where a checkpoint resumes exactly, if too many updates in a row were skipped."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.skipped_updates.stop_if_too_many(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what decides the future and is no tensor of a module, and what the run is and has come to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["record"] = asdict(self.record)
        if self.run_config is not None:
            checkpoint["config"] = self.run_config
        for name in self.with_state:
            state = None if getattr(self, name) is None else getattr(self, name).state_dict()
            if state:
                checkpoint[name] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it; refuse the checkpoint of another model, before its weights are loaded."""
        super().on_load_checkpoint(checkpoint)
        if "state_dict" in checkpoint:  # sharded ones are loaded by themselves
            check_same_weights(self, checkpoint["state_dict"], str(self.trainer.ckpt_path))
        self.record.resume(RunRecord(**checkpoint.get("record", {})))
        for name in self.with_state:
            if getattr(self, name) is not None and name in checkpoint:
                getattr(self, name).load_state_dict(checkpoint[name])

    def foreseeing(self, batch: PromptBatch) -> AbstractContextManager[None]:
        """Surrounds the sampling of the batch's responses, for what can be worked out meanwhile."""
        return nullcontext()

    def prompt_values(self, batch: PromptBatch) -> Tensor | None:
        """The critic's chance of success for each prompt, `[B]`; None without a critic."""
        return None

    @phase("validation")
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
        super().on_validation_epoch_end()
        self._report()

    def on_test_epoch_end(self) -> None:
        """Log avg@k and pass@k of every test set."""
        self._report()

    def more_metrics(self, names: Sequence[str]) -> dict[str, float]:
        """What else is reported of the data sets with these names, the same on every rank."""
        return {}

    @phase("validation")
    def _report(self) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        loaders = self.trainer.num_val_batches if self.trainer.validating else self.trainer.num_test_batches
        names = getattr(datamodule, "validation_names", None) or [f"set{i}" for i in range(len(loaders))]
        if self.trainer.testing:
            names = getattr(datamodule, "test_names", None) or names
        known = self.trainer.callback_metrics
        for name in [name for name in known if name.startswith("val/")]:
            del known[name]  # or what an earlier validation logged would pass for this one's, where it has none
        metrics = self.evaluation.report(names) | self.more_metrics(names)
        self.evaluation.reset()
        self.phase_seconds = {}
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.record.validation = metrics
        self.log_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()})
        if self.trainer.state.fn != TrainerFn.FITTING and self.trainer.is_global_zero and metrics:
            rich.get_console().print(metric_table(metrics, "Test" if self.trainer.testing else "Validation"))
