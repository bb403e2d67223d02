"""What runs in the race: methods, their training runs, and how one is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

import yaml

from sppo_lightning.config_files import merge, read

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART, BASELINES = ROOT / "configs" / "quickstart", ROOT / "configs" / "baselines"
PROMPTS, UPDATES = 128, 2  # per iteration
Rates = tuple[float, float | None]  # learning rates of policy and critic
# of the policy and of the critic: as many pairs for a method with a critic as for one without
RATES_ALONE = ((1.5e-4, None), (3e-4, None), (6e-4, None), (1.2e-3, None))
RATES_OF_BOTH = ((3e-4, 1e-3), (3e-4, 3e-3), (6e-4, 1e-3), (6e-4, 3e-3))
CORES: Queue[int] = Queue()  # that no run is on
for _core in sorted(os.sched_getaffinity(0)):
    CORES.put(_core)


@dataclass(frozen=True)
class Method:
    """A racer: its overlay on the quickstart's config, and how many responses it samples per prompt."""

    name: str
    overlay: str | None
    samples: int = 1
    sampled: int | None = None  # per prompt, the greedy one included
    critic: bool = False
    warmup: int = 5  # updates over which the policy's learning rate rises
    lr_of: str | None = None  # the method whose learning rates it takes, where it is a variant of it
    rates: Rates | None = None  # its own, where a relative's do not serve

    @property
    def responses(self) -> int:
        """Sampled per prompt, of whatever kind."""
        return self.sampled or self.samples


METHODS = [
    Method("SPPO", None, critic=True),
    Method("SPPO, small critic", "sppo_small_critic", critic=True),
    Method("batch mean", "batch_mean"),
    Method("GRPO", "grpo", 8),
    Method("RLOO", "rloo", 5),
    Method("ReMax", "remax", 1, 2),
    Method("PPO", "ppo", critic=True, warmup=15),  # after the critic's 10
    Method("PPO, BCE", "ppo_bce", critic=True, warmup=15),
    Method("SPPO, gated", "sppo_gated", critic=True, lr_of="SPPO"),
    Method("SPPO, shrinkage", "sppo_shrinkage", critic=True, lr_of="SPPO"),
    Method("SPPO, replay", "sppo_critic_replay", critic=True, lr_of="SPPO"),
]
FAMILY = [  # one run each, in the protocol `samples`
    Method("Dr. GRPO", "dr_grpo", 8, lr_of="GRPO"),
    Method("GSPO", "gspo", 8, lr_of="GRPO"),
    Method("DAPO", "dapo", 8, lr_of="GRPO"),
    Method("CISPO", "cispo", 8, lr_of="GRPO"),
    Method("SPPO, sequence ratio", "sppo_sequence_ratio", critic=True, lr_of="SPPO"),
    Method("SPPO, sequence ratio by length", "sppo_sequence_ratio_length", critic=True, lr_of="SPPO"),
    # with SPPO's 6e-4 the policy leaves its sampler so fast that joint weights are next to nothing: it gets worse
    Method("SPPO, off-policy", "sppo_off_policy", critic=True, lr_of="SPPO", rates=(1.5e-4, 1e-3)),
    Method("SPPO, hybrid", "sppo_hybrid", critic=True, lr_of="PPO, BCE"),
    Method("SPPO, decoupled critic", "sppo_decoupled_critic", critic=True, lr_of="SPPO"),
]


def grid(method: Method) -> tuple[Rates, ...]:
    """The learning rates that its scan begins with."""
    return RATES_OF_BOTH if method.critic else RATES_ALONE


@dataclass(frozen=True)
class Run:
    """One training run of the race or of the scan."""

    method: Method
    protocol: str
    rates: Rates
    seed: int
    seconds: float
    samples: int = 8  # per held-out prompt
    validations: int = 5  # after the first

    @property
    def folder(self) -> Path:
        """Where its summary goes, below the race's folder; a method with one response has one protocol."""
        protocol = self.protocol if self.method.responses > 1 else "both"
        name = self.method.name.lower().replace(", ", "_").replace(". ", "_").replace(" ", "_")
        rates = "_".join(f"{rate:g}" for rate in self.rates if rate is not None)
        return Path(f"{protocol}/{name}/lr{rates}_seed{self.seed}_{self.seconds:g}s")

    def config(self, folder: Path) -> dict[str, Any]:
        """The quickstart's config, the method's overlay, and what the race sets; `folder` is the race's."""
        prompts = PROMPTS if self.protocol == "prompts" else PROMPTS // self.method.responses // UPDATES * UPDATES
        model = str(warm_model(folder.resolve(), self.seed))
        policy_lr, critic_lr = self.rates
        settings: dict[str, Any] = {
            "policy_optimizer": {"lr": policy_lr, "warmup_updates": self.method.warmup},
            "mini_batch_size": prompts * self.method.samples // UPDATES,
        }
        if critic_lr is not None:
            settings["critic_optimizer"] = {"lr": critic_lr, "warmup_updates": 0}
        race = {
            "seed_everything": self.seed,
            "model": {"init_args": settings},
            "data": {"init_args": {"batch_size": prompts}},
            "trainer": {
                "max_time": None,
                "logger": False,
                "callbacks": [
                    {"class_path": "timed.TrainingMemory", "init_args": {"path": "memory.json"}},
                    {"class_path": "timed.CriticClock", "init_args": {"path": "critic_seconds.json"}},
                    {
                        "class_path": "sppo_lightning.callbacks.InitialValidation",
                        "init_args": {"min_pass_rate": 0.0, "metric": None},
                    },
                    {
                        "class_path": "sppo_lightning.callbacks.RolloutGeneration",
                        "init_args": {
                            "validation": {"samples_per_prompt": self.samples},
                            "validation_greedy": False,
                        },
                    },
                    {
                        "class_path": "sppo_lightning.callbacks.RunSummary",
                        "init_args": {"path": ".", "title": self.method.name},
                    },
                    {"class_path": "sppo_lightning.callbacks.HFExport", "init_args": {"path": "model"}},
                    {
                        "class_path": "timed.TimedValidation",
                        "init_args": {"seconds": self.seconds, "every_seconds": self.seconds / self.validations},
                    },
                ],
            },
        }
        overlay = [] if self.method.overlay is None else [read(str(BASELINES / f"{self.method.overlay}.yaml"))]
        merged: Any = merge([read(str(QUICKSTART / "sppo.yaml")), *overlay, race])
        unwanted = ("SampleLog", "Checkpoint", "CriticCalibration", "RichProgress")
        callbacks = merged["trainer"]["callbacks"]
        merged["trainer"]["callbacks"] = [c for c in callbacks if not c["class_path"].endswith(unwanted)]
        return yaml.safe_load(yaml.safe_dump(merged).replace("runs/quickstart/warm_start/model", model))


def quiet_environment(threads: int) -> dict[str, str]:
    """For a run in a process of its own: no warnings, no network, this project and its benchmarks on the path."""
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}


def fit(config: Path, folder: Path, *options: str) -> None:
    """One run of `fit` in `folder`, on one thread; its output goes to fit.log there."""
    command = [sys.executable, "-m", "sppo_lightning", "fit", "--config", str(config.resolve()), *options]
    environment = quiet_environment(threads=1)
    core = CORES.get()  # its own, so that what a run does beside sampling takes no time from another run
    try:
        with (folder / "fit.log").open("w") as log:
            pinned = ["taskset", "--cpu-list", str(core), *command]
            status = subprocess.run(pinned, cwd=folder, env=environment, stdout=log, stderr=log).returncode
    finally:
        CORES.put(core)
    if status:
        raise SystemExit(f"A run failed with status {status}; see {folder / 'fit.log'}.")


def warm_model(folder: Path, seed: int) -> Path:
    """Where the race's folder has the warm start with `seed`, as an exported model."""
    return folder / "warm_starts" / str(seed) / "runs/quickstart/warm_start/model"


def warm_start(folder: Path, seed: int) -> None:
    """Supervised warm start with `seed`, unless it is there."""
    if not (warm_model(folder, seed) / "model.safetensors").exists():
        target = folder / "warm_starts" / str(seed)
        target.mkdir(parents=True, exist_ok=True)
        fit(QUICKSTART / "sft.yaml", target, f"--seed_everything={seed}")


class Configured(Protocol):
    """A run that knows its config, and where below a benchmark's folder its results go."""

    @property
    def folder(self) -> Path: ...  # noqa: D102

    def config(self, folder: Path) -> dict[str, Any]: ...  # noqa: D102


def race(run: Configured, folder: Path) -> None:
    """One run, unless it is there."""
    target = folder / run.folder
    if (target / "summary.json").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "config.yaml").write_text(yaml.safe_dump(run.config(folder)))
    start = time.perf_counter()
    fit(target / "config.yaml", target)
    print(f"{run.folder}: {time.perf_counter() - start:.0f} s", flush=True)
