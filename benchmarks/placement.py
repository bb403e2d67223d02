"""How many GPUs sample and how many learn: memory, tokens per second and weight transfer, worked out on paper.

Prints, for each of the paper's settings, the split of 1, 8 and 64 GPUs that makes an iteration shortest, and what
limits it. Nothing is measured: decoding is bound by the bytes that it reads, the update by its operations, both at
the shares of the hardware's peak that are given; a response of full length is bound by its number of steps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

MASTER = 16  # bytes per weight that is trained: float32 weight, gradient and AdamW's two moments
SERVED = 2  # bytes per weight that samples


@dataclass(frozen=True)
class Model:
    """Sizes from its config.json."""

    name: str
    weights: float
    layers: int
    key_value_heads: int
    head: int  # size of one
    hidden: int

    @property
    def cache(self) -> int:
        """Bytes of keys and values for one token, in bf16."""
        return 2 * self.layers * self.key_value_heads * self.head * SERVED


@dataclass(frozen=True)
class Setting:
    """A run of the paper."""

    name: str
    policy: Model
    critic: Model
    responses: int  # of an iteration
    prompt: int  # tokens, on average
    response: int  # tokens, on average
    longest: int  # tokens of a response
    forwards: int = 1  # besides the update's: of the old log-probabilities


@dataclass(frozen=True)
class Hardware:
    """One GPU, and the shares of its peaks that are reached."""

    memory: float  # bytes
    bandwidth: float  # bytes per second
    operations: float  # per second, bf16
    link: float  # bytes per second between machines
    read_share: float
    operation_share: float


@dataclass(frozen=True)
class Plan:
    """What a split comes to."""

    learn: int  # GPUs
    sample: int  # GPUs; 0: the same as learn, one after the other
    memory: float  # bytes on a GPU that learns
    rows: int  # responses that a GPU decodes at once
    tokens_per_second: float  # of all GPUs that sample
    rollout: float  # seconds
    update: float  # seconds
    transfer: float  # seconds

    @property
    def iteration(self) -> float:
        """Seconds: side by side (`prefetch: 1`), or one after the other on the same GPUs."""
        longest = max(self.rollout, self.update) if self.sample else self.rollout + self.update
        return longest + self.transfer


SMALL = Model("1.5B", 1.78e9, 28, 2, 128, 1536)
LARGE = Model("7B", 7.62e9, 28, 4, 128, 3584)
SETTINGS = (
    Setting("1.5B, DeepScaleR", SMALL, SMALL, 256, 200, 4000, 8192),
    Setting("7B, DAPO-17k", LARGE, LARGE, 512, 200, 4000, 8192),
    Setting("7B, 1.5B critic", LARGE, SMALL, 512, 200, 4000, 8192),
)


def plan(setting: Setting, gpu: Hardware, learn: int, sample: int, micro_batch_tokens: int) -> Plan | None:
    """The iteration on so many GPUs; None where it does not fit."""
    policy, samplers = setting.policy, sample or learn
    trained = MASTER * (policy.weights + setting.critic.weights) / learn
    # activations recomputed block by block: the input of each, and the inside of one, some 16 times as much
    activations = micro_batch_tokens * policy.hidden * SERVED * (policy.layers + 16)
    used = trained + activations + (0 if sample else SERVED * policy.weights)
    for_cache = (0.9 * gpu.memory - SERVED * policy.weights) if sample else gpu.memory - used
    fit = int(for_cache // ((setting.prompt + setting.response) * policy.cache))
    if used > 0.95 * gpu.memory or fit < 1:
        return None
    rows = min(fit, -(-setting.responses // samplers))
    context = setting.prompt + setting.response / 2
    step = (SERVED * policy.weights + rows * context * policy.cache) / (gpu.read_share * gpu.bandwidth)
    rounds = setting.responses / samplers / rows
    rollout = max(rounds * setting.response, setting.longest) * step
    tokens = setting.responses * (setting.prompt + setting.response)
    operations = (6 + 2 * setting.forwards) * policy.weights * tokens
    operations += 8 * setting.critic.weights * setting.responses * setting.prompt
    update = operations / (gpu.operation_share * gpu.operations * learn)
    transfer = SERVED * policy.weights / gpu.link if sample else 0.0
    speed = setting.responses * setting.response / rollout
    return Plan(learn, sample, used, rows, speed, rollout, update, transfer)


def best(setting: Setting, gpu: Hardware, gpus: int, micro_batch_tokens: int) -> Plan | None:
    """The split that makes an iteration shortest."""
    splits = [(gpus, 0), *((learn, gpus - learn) for learn in range(1, gpus) if setting.responses % learn == 0)]
    found = [plan(setting, gpu, learn, sample, micro_batch_tokens) for learn, sample in splits]
    return min((p for p in found if p is not None), key=lambda p: p.iteration, default=None)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=float, default=80e9, help="bytes of one GPU")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second of its memory")
    parser.add_argument("--operations", type=float, default=989e12, help="bf16 operations per second")
    parser.add_argument("--link", type=float, default=50e9, help="bytes per second between machines")
    parser.add_argument("--read-share", type=float, default=0.6, help="of the bandwidth, in decoding")
    parser.add_argument("--operation-share", type=float, default=0.4, help="of the operations, in the update")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    asked = vars(parser.parse_args())
    micro_batch_tokens = asked.pop("micro_batch_tokens")
    gpu = Hardware(**asked)
    table = Table(title="On paper: what one iteration takes")
    for heading in (
        "setting",
        "GPUs",
        "learn + sample",
        "GB on one that learns",
        "responses at once on one that samples",
        "tokens/s",
        "rollout s",
        "update s",
        "transfer s",
        "iteration s",
    ):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for setting in SETTINGS:
        for gpus in (1, 8, 64):
            p = best(setting, gpu, gpus, micro_batch_tokens)
            if p is None:
                table.add_row(setting.name, str(gpus), "does not fit")
                continue
            split = f"{p.learn} + {p.sample}" if p.sample else f"{p.learn}, in turn"
            numbers = (p.memory / 1e9, p.rows, p.tokens_per_second, p.rollout, p.update)
            cells = [f"{number:,.0f}" for number in numbers]
            table.add_row(setting.name, str(gpus), split, *cells, f"{p.transfer:.1f}", f"{p.iteration:,.0f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
