"""Whether a long run grows: memory, processes, threads, open files and temporary files of half an hour of training.

Trains a tiny policy with `HFEngine`, `MathVerifier` on half of the prompts and `CodeVerifier` on the others (whose
responses stand in a function, so that all of them run in the sandbox), with checkpoints, validation, samples and
figures in TensorBoard every few iterations. Another process looks at it every few seconds. The report compares the
median of the last tenth with that of the tenth after the warm-up.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from measuring import save_figure, write_report
from rich.console import Console
from rich.table import Table

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import CodeVerifier, MathVerifier, RolloutGeneration, SampleLog
from sppo_lightning.data import ChainTask, PromptDataModule, PromptSource
from sppo_lightning.engines import Sampling
from sppo_lightning.figures.style import BLUE
from sppo_lightning.models import CharacterCritic, TinyPolicy
from sppo_lightning.optim import GroupOptimizer

WORDS = r"0 1 2 3 4 5 6 7 8 9 +1 +2 +3 = ; \boxed{ } a b c d e f g h i j k l m n o p q r s t"
WARM_UP = 0.2  # of the time: caches fill, and every kind of work has come several times
LOOK_SECONDS = 5.0
LARGEST_GROWTH = 0.03  # of resident memory
_TESTS = {"kind": "function", "fn": "answer", "cases": [{"args": [n], "expected": n} for n in range(3)]}


class Mixed(PromptSource):
    """Chains, every second of which is to be answered by a program."""

    origin = "Mixed"

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows."""
        chains = ChainTask({"1-4": 1.0}, size=1000).rows()
        kinds = ({"data_source": "math"}, {"data_source": "code", "tests": _TESTS})
        return [{**row, **kinds[i % 2]} for i, row in enumerate(chains)]


class WrittenAsProgram(CodeVerifier):
    """What the policy says, as the body of a function."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        """As `CodeVerifier`."""
        said = [response.replace("\\", "").replace("\n", " ") for response in responses]
        return super().score(prompts, [f"```python\ndef answer(n):\n    return {body} n\n```" for body in said])


def train(folder: str, minutes: float) -> None:
    """The run that is watched."""
    seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    rate = GroupOptimizer(lr=1e-3)
    policy = TinyPolicy(WORDS, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128)
    module = SPPOModule(policy, CharacterCritic(), policy_optimizer=rate, critic_optimizer=rate, mini_batch_size=32)
    data = PromptDataModule(
        train=Mixed(),
        validation={"chains": ChainTask({"1-4": 1.0}, size=32, split="validation")},
        batch_size=64,
        validation_batch_size=32,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_time=timedelta(minutes=minutes),
        default_root_dir=folder,
        check_val_every_n_epoch=None,
        val_check_interval=10,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[
            RolloutGeneration(Sampling(max_new_tokens=32)),
            MathVerifier(applies_to=["math", "chains"]),
            WrittenAsProgram(applies_to=["code"], timeout_seconds=5.0),
            SampleLog(every_n_iterations=10),
            ModelCheckpoint(every_n_train_steps=10),
        ],
    )
    trainer.fit(module, data)
    print(f"updates: {trainer.global_step}")


def look(pid: int, temporary: Path) -> dict[str, float]:
    """What the process `pid` and those below it hold at this moment."""
    root = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines())
    return {
        "memory": float(status["VmRSS"].split()[0]) * 1024,  # bytes
        "threads": float(status["Threads"]),
        "files": float(len(os.listdir(root / "fd"))),
        "processes": float(len(_below(pid))),
        "temporary files": float(sum(len(names) for _, _, names in os.walk(temporary))),
    }


def _below(pid: int) -> list[int]:
    """The process and all that it has started, and those in turn."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(word) for word in task.read_text().split()]
            found += [each for child in children for each in _below(child)]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def watch(minutes: float, temporary: Path) -> tuple[list[dict[str, float]], str]:
    """Looks at the run until it ends, and what it has printed at last."""
    looks, start = [], time.monotonic()
    words = [sys.executable, __file__, "--train", str(temporary / "run"), "--minutes", str(minutes)]
    environment = {**os.environ, "TMPDIR": str(temporary / "tmp"), "OMP_NUM_THREADS": "1"}
    temporary.chmod(0o755)  # the sandbox, which may have a user of its own, looks in from outside
    (temporary / "tmp").mkdir()
    with (temporary / "log").open("w") as log:
        run = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while run.poll() is None:
            try:
                looks.append({"seconds": time.monotonic() - start, **look(run.pid, temporary / "tmp")})
            except (FileNotFoundError, ProcessLookupError, KeyError):
                break
            time.sleep(LOOK_SECONDS)
        run.wait()
    said = (temporary / "log").read_text()
    if run.returncode:
        raise SystemExit(said[-2000:])
    return looks, said.strip().splitlines()[-1]


def compared(looks: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Medians of the tenth after the warm-up and of the last one, by what is counted."""
    first, tenth = int(WARM_UP * len(looks)), max(len(looks) // 10, 1)
    parts = {"after the warm-up": looks[first : first + tenth], "at the end": looks[-tenth:]}
    names = [name for name in looks[0] if name != "seconds"]
    return {name: {part: median(each[name] for each in rows) for part, rows in parts.items()} for name in names}


def curve(looks: Sequence[Mapping[str, float]]) -> Figure:
    """Resident memory over time."""
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    axes.plot([each["seconds"] / 60 for each in looks], [each["memory"] / 2**20 for each in looks], color=BLUE)
    axes.set(xlabel="minutes", ylabel="MiB resident", title="Resident memory of a run")
    axes.set_ylim(bottom=0)
    return figure


def main() -> None:
    """Train and watch, print the table, draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/soak.json"))
    parser.add_argument("--figures", type=Path, help="folder for the curve")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.train:
        train(settings.train, settings.minutes)
        return
    with tempfile.TemporaryDirectory() as temporary:
        looks, said = watch(settings.minutes, Path(temporary))
    counted = compared(looks)
    table = Table(title=f"{settings.minutes:g} minutes, {said}")
    for heading in ("", "after the warm-up", "at the end", "growth"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, (before, after) in ((name, each.values()) for name, each in counted.items()):
        shown = [f"{value / 2**20:,.0f} MiB" if name == "memory" else f"{value:,.0f}" for value in (before, after)]
        table.add_row(name, *shown, f"{after / before - 1:+.1%}" if before else "")
    Console().print(table)
    if settings.figures:
        save_figure(curve(looks), settings.figures / "soak.png")
    write_report(settings.output, {"counted": counted, "looks": looks, "said": said})
    before, after = counted["memory"].values()
    if after > (1 + LARGEST_GROWTH) * before:
        raise SystemExit(f"Resident memory has grown by {after / before - 1:.1%}.")


if __name__ == "__main__":
    main()
