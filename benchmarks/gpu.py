"""Decode and update on one GPU: the share of the card's bandwidth and arithmetic that they use, and plain torch's.

The shapes are those of Qwen2.5-0.5B and -1.5B with random weights, so nothing is downloaded. Decoding is `HFEngine`
and `PagedEngine` against `generate()`, all in bfloat16; the update is the policy's log-probabilities, clipped
objective, backward and fused AdamW against a plain training step (`model(input_ids, labels)`, AdamW), both with
float32 weights and bfloat16 arithmetic. Without CUDA, or with `--tiny`, the same code runs with a tiny shape, to
know that it works.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measuring import save_figure, write_report
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sppo_lightning.batch import Prompt, PromptBatch, Rollouts
from sppo_lightning.engines import Engine, HFEngine, PagedEngine, Sampling
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.errors import InputError
from sppo_lightning.figures.style import BLUE, GREY
from sppo_lightning.functional import token_clip_objective
from sppo_lightning.memory import Gauge
from sppo_lightning.models import CausalLMPolicy
from sppo_lightning.models.tiny import word_tokenizer

_QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
_LARGE = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960}
_SMALL = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-1.5B": {**_QWEN, **_LARGE, "max_position_embeddings": 32_768},
    "Qwen2.5-0.5B": {**_QWEN, **_SMALL, "max_position_embeddings": 32_768},
    "tiny": {**_QWEN, **_TINY, "vocab_size": 512},
}
_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bfloat16, FLOP/s, by the makers
_PROMPT = 128  # tokens
ENGINES: dict[str, Callable[..., Engine]] = {
    "HFEngine": HFEngine,
    "HFEngine, graphs": partial(HFEngine, cuda_graphs=True),
    "PagedEngine": PagedEngine,
}


class Bench:
    """Measures one shape on one device."""

    def __init__(self, shape: str, device: torch.device, folder: Path, compiled: bool) -> None:
        self.config, self.device, self.folder, self.compiled = SHAPES[shape], device, folder, compiled
        self.gauge = Gauge(device)
        self.generator = torch.Generator().manual_seed(0)

    def policy(self, dtype: torch.dtype) -> CausalLMPolicy:
        """Random weights."""
        torch.manual_seed(0)
        policy = CausalLMPolicy(config=self.config, tokenizer=str(self.folder), compile=self.compiled)
        policy.build()
        return policy.to(self.device, dtype)

    def ids(self, rows: int, length: int) -> list[list[int]]:
        """Random tokens, none of them special."""
        return torch.randint(3, self.config["vocab_size"], (rows, length), generator=self.generator).tolist()

    def timed(self, work: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
        """Seconds of the fastest of some runs after a first one, and the peak of memory in GiB."""
        seconds = []
        self.gauge.start()
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:]), self.gauge.peak() / 2**30

    def wait(self) -> None:
        """Until the device has done what it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def bandwidth(self) -> float:
        """Bytes per second that a copy moves, read and written."""
        size = 2**30 if self.device.type == "cuda" else 2**26
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        seconds, _ = self.timed(lambda: target.copy_(source), repeats=5)
        return 2 * size / seconds

    def arithmetic(self) -> float:
        """FLOP per second: the maker's figure for a known card, else that of a large product."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        for card, peak in _PEAK.items():
            if card in name:
                return peak
        size = 8192 if self.device.type == "cuda" else 512
        left = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
        seconds, _ = self.timed(lambda: left @ left, repeats=5)
        return 2 * size**3 / seconds

    # ------------------------------------------------------------------ decode

    def decode(self, rows: int, tokens: int, sampler: str) -> dict[str, float]:
        """Tokens per second of so many responses of so many tokens at once, and the share of the bandwidth."""
        policy = self.policy(torch.bfloat16)
        policy.model.generation_config.eos_token_id = None  # all responses are as long as they may be
        ids = self.ids(rows, _PROMPT)
        drawn: list[int] = []  # tokens of each run
        if sampler == "generate()":
            inputs = torch.tensor(ids, device=self.device)
            settings = {"min_new_tokens": tokens, "do_sample": True, "top_k": 0, "pad_token_id": 0}

            def work() -> None:
                drawn.append(policy.model.generate(inputs, max_new_tokens=tokens, **settings)[:, _PROMPT:].numel())
        else:
            engine, sampling = ENGINES[sampler](max_rows=rows), Sampling(max_new_tokens=tokens)
            batch = PromptBatch([Prompt("", "", "random", row) for row in range(rows)], ids, [0] * rows)
            engine.update_weights(policy, 0)

            def work() -> None:  # random weights end a response now and then
                drawn.append(sum(len(response.token_ids) for response in engine.stream(batch, sampling)))

        seconds, peak = self.timed(work)
        speed = drawn[-1] / seconds
        config = policy.model.config
        head = config.hidden_size // config.num_attention_heads
        cached = 4 * config.num_hidden_layers * config.num_key_value_heads * head  # bytes of a token, bfloat16
        weights = sum(p.numel() * p.element_size() for p in policy.parameters())
        moved = weights + rows * (_PROMPT + tokens / 2) * cached  # of one step, if everything is read once
        share = speed / rows * moved / self.bandwidth()
        return {"tokens_per_second": speed, "bandwidth_share": share, "peak_gib": peak}

    # ------------------------------------------------------------------ update

    def update(self, rows: int, length: int, plain: bool) -> dict[str, float]:
        """Tokens per second of forward, backward and step, and the share of the arithmetic."""
        policy = self.policy(torch.float32)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=not plain or None)
        step = self._plain_step(policy, rows, length) if plain else self._step(policy, rows, length)

        def work() -> None:
            with self._autocast():
                loss = step()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        seconds, peak = self.timed(work, repeats=3)
        config, parameters = policy.model.config, sum(p.numel() for p in policy.parameters())
        # forward and backward: two FLOP per weight and token, thrice; half of the attention is masked
        flop = 6 * parameters * rows * length
        flop += 6 * config.num_hidden_layers * config.hidden_size * rows * length**2
        speed = rows * length / seconds
        return {
            "tokens_per_second": speed,
            "flop_utilisation": flop / seconds / self.arithmetic(),
            "peak_gib": peak,
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _step(self, policy: CausalLMPolicy, rows: int, length: int) -> Callable[[], Tensor]:
        rollouts = self._rollouts(policy, rows, length)
        advantages = torch.linspace(-1, 1, rows, device=self.device)[:, None].expand_as(rollouts.response_mask)

        def loss() -> Tensor:
            log_probs, _ = policy(rollouts)
            old = log_probs.detach()
            losses, _ = token_clip_objective(log_probs, old, advantages, rollouts.response_mask)
            return losses.sum() / rollouts.response_mask.sum()

        return loss

    def _plain_step(self, policy: CausalLMPolicy, rows: int, length: int) -> Callable[[], Tensor]:
        ids = torch.tensor(self.ids(rows, length), device=self.device)
        return lambda: policy.model(input_ids=ids, labels=ids).loss

    def _rollouts(self, policy: CausalLMPolicy, rows: int, length: int) -> Rollouts:
        batch = PromptBatch(
            [Prompt("", "", "random", row) for row in range(rows)], self.ids(rows, _PROMPT), [0] * rows
        )
        tokens = length - _PROMPT
        return pack_rollouts(
            batch,
            list(range(rows)),
            self.ids(rows, tokens),
            [[-1.0] * tokens] * rows,
            ["length"] * rows,
            policy=policy,
            temperature=1.0,
            versions=[0] * rows,
        )


def measure(arguments: argparse.Namespace, device: torch.device, folder: Path) -> tuple[list[dict], list[str]]:
    """All cases that the time allows, the telling ones first; and those that were left out."""
    deadline, results, left_out = time.monotonic() + 60 * arguments.minutes, [], []
    shapes = ["tiny"] if arguments.tiny else ["Qwen2.5-1.5B", "Qwen2.5-0.5B"]
    length = 512 if arguments.tiny else 4096
    new = 32 if arguments.tiny else 256
    cases: list[tuple[str, str, tuple[Any, ...]]] = []
    for shape in shapes:
        cases += [(shape, "update", (1, length, plain)) for plain in (False, True)]
        cases += [
            (shape, "decode", (rows, new, name)) for rows in (256, 32, 1) for name in ("generate()", *ENGINES)
        ]
        cases += [(shape, "update", (4, length // 4, plain)) for plain in (False, True)]
    for shape, kind, settings in cases:
        name = f"{shape}, {kind} {settings}"
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        bench = Bench(shape, device, folder, arguments.compile)
        try:
            figures = getattr(bench, kind)(*settings)
        except torch.OutOfMemoryError:
            left_out.append(f"{name} (out of memory)")
            continue
        except InputError as error:
            left_out.append(f"{name} ({error})")
            continue
        finally:
            gc.collect()
        results.append({"shape": shape, "kind": kind, "settings": list(settings), **figures})
        print(f"{name}: {figures}", flush=True)
    return results, left_out


def show(results: list[dict[str, Any]], left_out: list[str]) -> None:
    """Two tables: decode and update."""
    decode, update = Table(title="Decode, bfloat16"), Table(title="Update, float32 weights, bfloat16 arithmetic")
    for column in ("shape", "rows", "sampler", "tokens/s", "× generate()", "of the bandwidth", "peak"):
        decode.add_column(column, justify="right")
    for column in ("shape", "rows × length", "step", "tokens/s", "FLOP utilisation", "peak"):
        update.add_column(column, justify="right")
    for each in results:
        speed, peak = f"{each['tokens_per_second']:,.0f}", f"{each['peak_gib']:.1f} GiB"
        if each["kind"] == "decode":
            rows, _, sampler = each["settings"]
            ratio, share = f"{_ratio(each, results):.2f}", f"{each['bandwidth_share']:.1%}"
            decode.add_row(each["shape"], str(rows), sampler, speed, ratio, share, peak)
        else:
            rows, length, plain = each["settings"]
            share, kind = f"{each['flop_utilisation']:.1%}", "plain" if plain else "ours"
            update.add_row(each["shape"], f"{rows} × {length}", kind, speed, share, peak)
    for table in (decode, update):
        Console(width=130).print(table)
    if left_out:
        print("Left out: " + "; ".join(left_out))


def _ratio(decoded: dict[str, Any], results: list[dict[str, Any]]) -> float:
    """Its speed, where that of `generate()` with as many rows is 1."""
    same = decoded["shape"], [*decoded["settings"][:2], "generate()"]
    base = [each for each in results if (each["shape"], each["settings"]) == same]
    return float(decoded["tokens_per_second"] / base[0]["tokens_per_second"]) if base else float("nan")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Decode against generate(), and FLOP utilisation."""
    figure = Figure(figsize=(9, 3.5))
    left, right = figure.subplots(1, 2)
    decode = [each for each in results if each["kind"] == "decode" and each["settings"][2] in ENGINES]
    names = [f"{each['shape']}, {each['settings'][0]} rows, {each['settings'][2]}" for each in decode]
    left.barh(names, [_ratio(each, results) for each in decode], color=BLUE)
    left.axvline(1.0, color=GREY)
    left.set_xlabel("decode, × generate()")
    update = [each for each in results if each["kind"] == "update"]
    names = [f"{e['shape']}, {e['settings'][0]} × {e['settings'][1]}{', plain' * e['settings'][2]}" for e in update]
    right.barh(names, [each["flop_utilisation"] for each in update], color=BLUE)
    right.set_xlabel("update, FLOP utilisation")
    save_figure(figure, path)


def main() -> None:
    """Parse the arguments, measure, print, plot and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0, help="no case is begun after so many")
    parser.add_argument("--tiny", action="store_true", default=not torch.cuda.is_available())
    parser.add_argument("--compile", action="store_true", help="compile each block for the update")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/gpu.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        word_tokenizer(["a", "b", "c"]).save_pretrained(folder)
        results, left_out = measure(arguments, device, Path(folder))
    show(results, left_out)
    write_report(arguments.output, {"results": results, "left_out": left_out})
    plot(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
