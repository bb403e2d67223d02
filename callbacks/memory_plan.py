"""Whether the longest prompts and responses fit into memory, found out before the first iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import rich
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from rich.table import Table
from torch import Tensor

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.batching import micro_batches
from sppo_lightning.callbacks.rollout_generation import RolloutGeneration
from sppo_lightning.engines import HFEngine, Sampling
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.memory import Gauge, is_out_of_memory
from sppo_lightning.models.sharding import local
from sppo_lightning.module import SPPOModule
from sppo_lightning.ranks import gather_objects

_SHORTER = "a smaller `sampling.max_new_tokens` or a smaller model, since not even one fits"
_CHEAPER = "`gradient_checkpointing: true` of policy and critic, or " + _SHORTER
_DECODED = 3  # tokens, after a prefill of all the others: enough for the cache to be full once


class MemoryPlan(Callback):
    """Samples and learns once from the longest prompts with the longest responses, before the first iteration.

    Then prints what memory goes where, and how much is left. What does not fit ends the run at once, with the
    setting to lower and the value that does fit. Nothing of it stays: no weight, gradient, figure or random number
    is another one afterwards. On a GPU the figures are of what tensors take; on a CPU of the process's resident
    memory, which counts what the allocator keeps.

    The longest prompts are the training data's own. The responses are as long as `max_new_tokens` allows, of
    random tokens. An engine that samples elsewhere is left out.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out how responses are sampled."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        stages = [callback for callback in callbacks if isinstance(callback, RolloutGeneration)]
        if not stages:
            raise InputError(
                "`trainer.callbacks` lists MemoryPlan, which needs to know how long responses are, without "
                "RolloutGeneration; list it too, or remove MemoryPlan."
            )
        if stage == "fit" and not isinstance(pl_module, SPPOModule):
            raise InputError(
                f"`trainer.callbacks` lists MemoryPlan, which plans what SPPOModule samples and learns from, and "
                f"`model` is {type(pl_module).__name__}; remove MemoryPlan."
            )
        self._generation = stages[0]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try it out, and print the plan of the rank that needs most."""
        loader: Any = trainer.train_dataloader
        if not hasattr(loader, "longest"):
            raise InputError(
                f"MemoryPlan asks PromptDataModule for the longest prompts, and the data are a "
                f"{type(loader).__name__}; use sppo_lightning.data.PromptDataModule, or remove MemoryPlan."
            )
        batch = loader.longest(max(1, loader.batch_size // trainer.world_size))
        try:
            own: dict[str, int] | str = self._plan(trainer, pl_module, batch)
        except InputError as error:
            own = str(error)  # to be raised on all ranks, of which the others wait for this one's plan
        plans: list[dict[str, int]] = []
        for found in gather_objects(own):
            if isinstance(found, str):
                raise InputError(found)
            plans.append(found)
        largest = min(plans, key=lambda each: each["there"] - _needed(each))
        if trainer.is_global_zero:
            rich.get_console().print(_table(largest, str(pl_module.device)))
        if _needed(largest) > largest["there"]:
            rank_zero_warn(
                f"MemoryPlan: the longest prompts and responses need {_gib(_needed(largest))}, where "
                f"{_gib(largest['there'])} are there; lower `model.micro_batch_tokens` or, for the rollout, "
                "`max_tokens` of the engine."
            )

    def _plan(self, trainer: Trainer, module: Any, batch: PromptBatch) -> dict[str, int]:
        """Bytes by what they are for, on this rank."""
        gauge, optimizer = Gauge(module.device), trainer.optimizers[0]
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
            plan = _kept(module)
            # it comes with the first step, where no checkpoint has brought it, and is there from then on
            to_come = _moments_to_come(optimizer, plan["optimizer"])
            plan["rollout"] = self._rollout(module, gauge, batch)
            plan["update"] = self._update(module, gauge, batch, trainer.world_size)
            del to_come
        state = [t for each in optimizer.state.values() for t in each.values() if isinstance(t, Tensor)]
        return plan | {"there": gauge.total(), "held": gauge.held() - _bytes(state)}

    def _rollout(self, module: Any, gauge: Gauge, batch: PromptBatch) -> int:
        """Bytes that the engine needs at most, with its cache full."""
        engine, sampling = self._generation.engine, self._generation.sampling
        if not isinstance(engine, HFEngine):
            return 0
        longest = max(map(len, batch.token_ids))
        rows = engine.rows(len(batch), longest, sampling)
        prompt = _random(module, longest + max(sampling.max_new_tokens - _DECODED, 0))
        few = min(_DECODED, sampling.max_new_tokens)
        # responses to one prompt share its prefill, so that it is quick to fill the cache
        alone = PromptBatch(batch.prompts[:1], [prompt], [0])

        engine.update_weights(module.policy, module.trainer.global_step)  # a copy of a sharded policy stays

        def sample(rows: int) -> None:
            for _ in engine.stream(alone, Sampling(max_new_tokens=few, samples_per_prompt=rows)):
                pass

        peak, fitting = _largest_that_fits(sample, rows, gauge)
        if fitting < rows:
            tokens = longest + sampling.max_new_tokens
            raise InputError(
                f"`max_tokens`={engine.max_tokens} of HFEngine lets {rows} responses of up to {tokens} tokens be "
                f"decoded at once, which do not fit into memory; use {fitting * tokens or _SHORTER}."
            )
        return peak

    def _update(self, module: Any, gauge: Gauge, batch: PromptBatch, ranks: int) -> int:
        """Bytes that the largest micro-batch needs at most, its gradients included."""
        rollouts = self._longest_rollouts(module, batch, ranks)
        together = 1 if module.policy.group is None else module.policy.group.size()  # ranks, each with its share
        budget, longest = module.micro_batch_tokens // together, max(rollouts.lengths)
        rows, length = _fullest(budget, longest, len(rollouts), longest - self._generation.sampling.max_new_tokens)

        def learn(rows: int) -> None:
            module.zero_grad(set_to_none=True)  # what a try that failed has left
            # a row that is longer than the budget still comes, alone
            tried = rollouts if rows == 1 else _shorter(rollouts, longest - length)
            lengths = [] if module.critic is None else module.critic.lengths(tried)
            # as long as the whole budget is tried, the critic's share of it is
            [group, *_] = [*micro_batches(lengths, rows * max(tried.lengths)), []]
            _backward(module, tried, list(range(rows)), group)

        peak, fitting = _largest_that_fits(learn, rows, gauge)
        module.zero_grad(set_to_none=True)
        if fitting < rows:
            raise InputError(
                f"`model.micro_batch_tokens`={module.micro_batch_tokens} does not fit into memory with "
                f"{rows * together} responses of {length} tokens, prompt included; use "
                f"{together * (longest if fitting == 1 else fitting * length) or _CHEAPER}."
            )
        return peak

    def _longest_rollouts(self, module: Any, batch: PromptBatch, ranks: int) -> Rollouts:
        """A mini-batch of this rank, all prompts and responses as long as they come."""
        sampling = self._generation.sampling
        size = module.mini_batch_size or len(batch) * ranks * sampling.samples_per_prompt
        index = [i % len(batch) for i in range(max(1, size // ranks))]
        tokens = sampling.max_new_tokens
        return pack_rollouts(
            batch,
            index,
            [_random(module, tokens) for _ in index],
            [[-1.0] * tokens for _ in index],
            ["length"] * len(index),
            policy=module.policy,
            temperature=sampling.temperature or 1.0,
            versions=[module.trainer.global_step] * len(index),
        )


def _backward(module: Any, rollouts: Rollouts, policy_rows: list[int], critic_rows: list[int]) -> None:
    """One micro-batch, as in the training step; ranks exchange nothing."""
    log_probs, _ = module.policy(rollouts.rows(policy_rows))
    loss = -log_probs.mean()
    if module.kl_coef and module.kl_in == "loss":
        with torch.no_grad():
            module.reference(rollouts.rows(policy_rows))
    for _ in range(1 if module.critic_replay is None else 2):  # as many again of earlier iterations
        if critic_rows:
            loss = loss + module.critic.outputs(rollouts.rows(critic_rows)).mean()
    strategy = module.trainer.strategy
    # not through the trainer, whose hooks would tell other callbacks of it
    with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
        loss.backward()


def _fullest(budget: int, longest: int, most: int, prompt: int) -> tuple[int, int]:
    """The rows of a micro-batch, and their tokens, that leave the least of `budget` unused.

    Two rows that fill it need more than one that is longer than either.
    """
    rows = min(most, max(1, -(-budget // longest)))
    length = longest if rows == 1 else min(longest, budget // rows)
    if length <= prompt:  # without a response
        return min(most, max(1, budget // longest)), longest
    return rows, length


def _shorter(rollouts: Rollouts, tokens: int) -> Rollouts:
    """The rollouts without the last so many tokens of each response."""
    names = ("response_ids", "response_mask", "sampled_log_probs")
    kept = rollouts.response_ids.shape[1] - tokens
    return dataclasses.replace(rollouts, **{name: getattr(rollouts, name)[:, :kept] for name in names})


def _moments_to_come(optimizer: torch.optim.Optimizer, size: int) -> list[Tensor]:
    """AdamW's two moments of each parameter that has none yet, to hold while other things are tried."""
    fresh = [p for group in optimizer.param_groups for p in group["params"] if not optimizer.state.get(p)]
    try:
        return [torch.zeros_like(parameter) for parameter in fresh for _ in range(2)]
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    raise InputError(
        f"The optimizer's state of {_gib(size)} does not fit into memory beside the weights; train with `lora`, or "
        "shard policy and critic over more devices."
    )


def _largest_that_fits(work: Callable[[int], None], rows: int, gauge: Gauge) -> tuple[int, int]:
    """The bytes that `work` needs with the most rows, of `rows`, `rows / 2` …, that fit; and these rows, or 0."""
    while rows:
        before = gauge.start()
        try:
            work(rows)
            return gauge.peak() - before, rows
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        rows //= 2
    return 0, 0


def _random(module: Any, tokens: int) -> list[int]:
    vocabulary = len(module.policy.tokenizer)
    return torch.randint(vocabulary, (tokens,)).tolist()


def _kept(module: Any) -> dict[str, int]:
    """Bytes of this rank's share of what is there all the time, or comes with the first step and stays."""
    models = {"policy": module.policy, "critic": module.critic, "reference": module.reference}
    shared = {id(parameter) for parameter in module.policy.parameters()}
    sizes = {}
    for name, model in models.items():
        own = [] if model is None else list(model.parameters())
        sizes[name] = _bytes(p for p in own if name == "policy" or id(p) not in shared)
    trained = [p for model in (module.policy, module.critic) if model is not None for p in model.parameters()]
    sizes["gradients"] = _bytes(p for p in trained if p.requires_grad)
    return sizes | {"optimizer": 2 * sizes["gradients"]}  # AdamW's two moments


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in map(local, tensors))


def _needed(plan: dict[str, int]) -> int:
    return plan["held"] + plan["optimizer"] + max(plan["rollout"], plan["update"])


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _table(plan: dict[str, int], device: str) -> Table:
    """What goes where."""
    table = Table(title=f"Memory with the longest prompts and responses ({device})", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    weights = plan["policy"] + plan["critic"] + plan["reference"]
    rows = {
        "weights of the policy": plan["policy"],
        "weights of the critic": plan["critic"],
        "weights of the reference": plan["reference"],
        "optimizer": plan["optimizer"],
        "all else that is there": max(plan["held"] - weights, 0),
        "rollout: keys and values, and one step": plan["rollout"],
        "update: gradients": plan["gradients"],
        "update: activations of a micro-batch": max(plan["update"] - plan["gradients"], 0),
    }
    for name, size in rows.items():
        if size:
            table.add_row(name, _gib(size))
    table.add_section()
    table.add_row("needed at most", _gib(_needed(plan)))
    table.add_row("there", _gib(plan["there"]))
    table.add_row("left", _gib(plan["there"] - _needed(plan)))
    return table
