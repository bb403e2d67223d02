"""The race: SPPO against its relatives on the embedded task, from the same warm starts, by time and by samples.

Two protocols. `prompts` is the paper's: every method sees the same prompts per iteration, so GRPO samples eight
times as much. `samples` gives every method the same number of responses per iteration. Learning rates are scanned
with the same budget for every method: four runs, of the policy's rate alone or, where there is a critic, of both,
and a fifth where the best lies at the edge; the best two run on a second warm start, and the mean of both decides.
Neither warm start is raced. The rest of the family follows with one run each, at the rates of the nearest racer.
Every run has a core to itself. Finished runs are kept: started again, the script goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import pass_rates
import race_report as report
import torch
import yaml

from sppo_lightning.config_files import merge, read

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART, BASELINES = ROOT / "configs" / "quickstart", ROOT / "configs" / "baselines"
PROMPTS, UPDATES = 128, 2  # per iteration
# of the policy and of the critic: as many pairs for a method with a critic as for one without
RATES_ALONE = ((1.5e-4, None), (3e-4, None), (6e-4, None), (1.2e-3, None))
RATES_OF_BOTH = ((3e-4, 1e-3), (3e-4, 3e-3), (6e-4, 1e-3), (6e-4, 3e-3))
SCAN_SEEDS = (100, 101)  # of the warm starts on which learning rates are chosen
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
    rates: tuple[float, float | None] | None = None  # its own, where a relative's do not serve

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


def grid(method: Method) -> tuple[tuple[float, float | None], ...]:
    """The learning rates that its scan begins with."""
    return RATES_OF_BOTH if method.critic else RATES_ALONE


@dataclass(frozen=True)
class Run:
    """One training run of the race or of the scan."""

    method: Method
    protocol: str
    rates: tuple[float, float | None]  # learning rates of policy and critic
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

    def config(self, warm_starts: Path) -> dict[str, Any]:
        """The quickstart's config, the method's overlay, and what the race sets."""
        prompts = PROMPTS if self.protocol == "prompts" else PROMPTS // self.method.responses // UPDATES * UPDATES
        model = str(warm_starts / str(self.seed) / "runs/quickstart/warm_start/model")
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
        unwanted = ("SampleLog", "ModelCheckpoint", "CriticCalibration", "RichProgress")
        callbacks = merged["trainer"]["callbacks"]
        merged["trainer"]["callbacks"] = [c for c in callbacks if not c["class_path"].endswith(unwanted)]
        return yaml.safe_load(yaml.safe_dump(merged).replace("runs/quickstart/warm_start/model", model))


def fit(config: Path, folder: Path, *options: str) -> None:
    """One run of `fit` in `folder`, on one thread; its output goes to fit.log there."""
    command = [sys.executable, "-m", "sppo_lightning", "fit", "--config", str(config.resolve()), *options]
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    core = CORES.get()  # its own, so that what a run does beside sampling takes no time from another run
    try:
        with (folder / "fit.log").open("w") as log:
            pinned = ["taskset", "--cpu-list", str(core), *command]
            status = subprocess.run(pinned, cwd=folder, env=environment, stdout=log, stderr=log).returncode
    finally:
        CORES.put(core)
    if status:
        raise SystemExit(f"A run failed with status {status}; see {folder / 'fit.log'}.")


def warm_start(folder: Path, seed: int) -> None:
    """Supervised warm start with `seed`, unless it is there."""
    target = folder / str(seed)
    if not (target / "runs/quickstart/warm_start/model/model.safetensors").exists():
        target.mkdir(parents=True, exist_ok=True)
        fit(QUICKSTART / "sft.yaml", target, f"--seed_everything={seed}")


def race(run: Run, folder: Path) -> None:
    """One run, unless it is there."""
    target = folder / run.folder
    if (target / "summary.json").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "config.yaml").write_text(yaml.safe_dump(run.config((folder / "warm_starts").resolve())))
    start = time.perf_counter()
    fit(target / "config.yaml", target)
    print(f"{run.folder}: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Warm starts, scan, race, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the race, each with a warm start of its own")
    parser.add_argument("--seconds", type=float, default=75, help="training time of a run of the race")
    parser.add_argument("--scan-seconds", type=float, default=40, help="training time of a run of the scan")
    parser.add_argument("--methods", default="", help="names, separated by ';'; all when left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"), help="where everything goes")
    parser.add_argument("--figures", type=Path, default=None, help="folder for the figures, docs for instance")
    arguments = parser.parse_args()
    asked = set(filter(None, arguments.methods.split(";")))
    asked |= {m.lr_of for m in METHODS if m.name in asked and m.lr_of}
    chosen = [m for m in METHODS if not asked or m.name in asked]
    folder, seeds = arguments.folder, range(1, arguments.seeds + 1)

    def side_by_side(task: Any, *rows: Any) -> None:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(task, *rows))

    side_by_side(lambda seed: warm_start(folder / "warm_starts", seed), [*SCAN_SEEDS, *seeds])
    pairs = [(m, p) for m in chosen for p in ("prompts", "samples") if m.responses > 1 or p == "prompts"]

    def scanned(method: Method, protocol: str, rates: tuple[float, float | None], seed: int = SCAN_SEEDS[0]) -> Run:
        return Run(method, protocol, rates, seed, arguments.scan_seconds, samples=4, validations=3)

    def score(run: Run) -> float:
        return report.scan_score(folder / run.folder)

    scan = {
        (method, protocol): [scanned(method, protocol, rates) for rates in grid(method)]
        for method, protocol in pairs
        if method.lr_of is None
    }
    side_by_side(lambda run: race(run, folder), [run for runs in scan.values() for run in runs])
    for (method, protocol), runs in scan.items():  # one step further where the best lies at the edge
        policy, critic = max(runs, key=score).rates
        tried = [run.rates[0] for run in runs]
        if policy in (min(tried), max(tried)):
            further = policy * 2 if policy == max(tried) else policy / 2
            runs.append(scanned(method, protocol, (further, critic)))
    side_by_side(lambda run: race(run, folder), [run for runs in scan.values() for run in runs])
    finals = {
        pair: [(run, scanned(*pair, run.rates, SCAN_SEEDS[1])) for run in sorted(runs, key=score)[-2:]]
        for pair, runs in scan.items()
    }
    side_by_side(lambda run: race(run, folder), [second for runs in finals.values() for _, second in runs])
    best = {
        (method.name, protocol): max(runs, key=lambda both: sum(map(score, both)))[0].rates
        for (method, protocol), runs in finals.items()
    }
    for pair, both in finals.items():
        scan[pair] += [second for _, second in both]

    def rates_of(method: Method, protocol: str) -> tuple[float, float | None]:
        name = method.lr_of or method.name
        return best[name, protocol] if (name, protocol) in best else best[name, "prompts"]

    raced = {
        (method, protocol): [
            Run(method, protocol, rates_of(method, protocol), seed, arguments.seconds) for seed in seeds
        ]
        for method, protocol in pairs
    }
    # seed by seed, so that what disturbs the machine for a while disturbs all methods
    side_by_side(lambda run: race(run, folder), [runs[i] for i in range(len(seeds)) for runs in raced.values()])
    family = [
        Run(method, "samples", method.rates or rates_of(method, "samples"), seeds[0], arguments.seconds)
        for method in FAMILY
        if method.lr_of in {chosen.name for chosen, _ in raced}
    ]
    side_by_side(lambda run: race(run, folder), family)
    figures = arguments.figures or folder
    figures.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    models = {str(seed): folder / f"warm_starts/{seed}/runs/quickstart/warm_start/model" for seed in seeds}

    def folders(runs: Mapping[Any, list[Run]]) -> dict[report.Key, list[tuple[Path, report.Rates]]]:
        return {
            (method.name, p): [(folder / run.folder, run.rates) for run in r] for (method, p), r in runs.items()
        }

    report.write(
        folders(raced),
        folders(scan),
        folders({(run.method, run.protocol): [run] for run in family}),
        pass_rates.report(models, figures),
        {method.name for method in METHODS if method.lr_of},
        folder,
        figures,
    )


if __name__ == "__main__":
    main()
