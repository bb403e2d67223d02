"""What the benchmark of exploration compares, and how one run of it is set up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from race_runs import QUICKSTART, warm_model

from sppo_lightning.config_files import merge, read

BANDS = {"short": "2-4", "medium": "5-7", "long": "8-10"}  # operations
HARDEST = "long"
LONGEST = 66  # tokens; a worked solution has five per operation and five behind them, the end included
STEP = 5  # tokens of a step, such as `a 9 +3 = 2`


def component(name: str, **settings: Any) -> dict[str, Any]:
    """A component of a config."""
    return {"class_path": f"sppo_lightning.{name}", "init_args": settings}


def stages(*callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """An overlay with more callbacks."""
    return {"trainer": {"callbacks": list(callbacks)}}


def curriculum(name: str, **settings: Any) -> dict[str, Any]:
    """An overlay with a curriculum."""
    return {"data": {"init_args": {"curriculum": component(f"data.{name}", **settings)}}}


@dataclass(frozen=True)
class Arm:
    """One way to meet prompts that are hardly ever solved: an overlay on the common config."""

    name: str
    overlay: Mapping[str, Any] = field(default_factory=dict)


def search(batch: int, name: str, **settings: Any) -> dict[str, Any]:
    """An overlay that searches prompts of which the critic has little hope, and imitates what is found."""
    engine = component(f"engines.{name}", budget_tokens=16 * LONGEST, **settings)
    return stages(component("callbacks.SearchHopeless", search=engine, below=0.2, max_prompts=batch // 8))


def arms(batch: int) -> list[Arm]:
    """What is compared, for iterations of so many prompts."""
    # one stage of easier prompts: two would have fewer than a batch each
    staged = curriculum("StagedCurriculum", column="operations", stages=[7], ramp_iterations=5)
    solvability = curriculum("SolvabilityCurriculum", rescore_every_n_iterations=5, sharpness=2.0)
    replay = stages(component("callbacks.SuccessReplay", below=0.5, rows=batch, coef=0.3))
    # the first responses take some 46 tokens each
    adaptive: Any = stages(component("callbacks.AdaptiveSamples", budget_tokens=69 * batch))
    adaptive["model"] = {"init_args": {"advantage": component("pooling.PooledAdvantage")}}
    return [
        Arm("uniform"),
        Arm("staged", staged),
        Arm("pass rate", curriculum("PassRateCurriculum")),
        Arm("solvability", solvability),
        Arm("adaptive N", adaptive),
        Arm("best of N", search(batch, "BestOfN", n=16, at_once=4)),
        Arm("tree search", search(batch, "TreeSearchEngine", step_tokens=STEP, step_end=[])),
        Arm("replay", replay),
        Arm("staged, replay", merge([staged, replay])),
        Arm("solvability, replay", merge([solvability, replay])),
    ]


@dataclass(frozen=True)
class Run:
    """One training run: an arm from one warm start."""

    arm: Arm
    seed: int
    tokens: int  # generated, after which it ends
    every_tokens: int  # from one validation to the next
    enough: float  # accuracy on the hardest band at which it ends sooner
    batch: int  # prompts of an iteration; an update is of at most 64
    easy: float  # share of the prompts that are not of the hardest band

    @property
    def folder(self) -> Path:
        """Where its results go, below the benchmark's folder."""
        settings = f"easy{self.easy:g}_batch{self.batch}_seed{self.seed}_{self.tokens}"
        return Path(self.arm.name.replace(" ", "_")) / settings

    @property
    def mix(self) -> dict[str, float]:
        """Shares of the training prompts by operations."""
        easier = [operations for band, operations in BANDS.items() if band != HARDEST]
        return dict.fromkeys(easier, self.easy / len(easier)) | {BANDS[HARDEST]: 1 - self.easy}

    def config(self, folder: Path) -> dict[str, Any]:
        """The quickstart's config, the benchmark's task and settings, and the arm's overlay."""
        base: Any = read(str(QUICKSTART / "sppo.yaml"))
        data = base["data"]["init_args"]
        data["validation"] = {
            name: component("data.ChainTask", operations={band: 1}, size=48, split="validation", answer="solution")
            for name, band in BANDS.items()
        }
        data["train"]["init_args"] |= {"operations": self.mix, "size": 6000, "answer": "solution"}
        unwanted = ("SampleLog", "Checkpoint", "CriticCalibration", "RichProgress", "HFExport")
        callbacks = [c for c in base["trainer"]["callbacks"] if not c["class_path"].endswith(unwanted)]
        base["trainer"] |= {"max_time": "00:00:30:00", "logger": False, "callbacks": callbacks}
        common = {
            "seed_everything": self.seed,
            "model": {
                "init_args": {
                    "policy_optimizer": {"lr": 3e-4, "warmup_updates": 5},
                    "critic_optimizer": {"lr": 3e-3, "warmup_updates": 0},
                    "critic_warmup": component(
                        "warmup.CriticWarmup", updates=10, min_brier_skill=0.0, max_updates=60
                    ),
                    "mini_batch_size": min(self.batch, 64),
                }
            },
            "data": {"init_args": {"batch_size": self.batch}},
            **stages(
                component("callbacks.InitialValidation", min_pass_rate=0.0, metric=None),
                component(
                    "callbacks.RolloutGeneration",
                    engine={"class_path": "timed.CountingEngine"},
                    sampling={"max_new_tokens": LONGEST},
                    validation={"samples_per_prompt": 4, "max_new_tokens": LONGEST},
                    validation_greedy=False,
                ),
                component("callbacks.ExactMatch", extract="whole"),
                component("callbacks.RunSummary", path=".", title=self.arm.name),
            ),
        }
        clock: dict[str, Any] = {"tokens": self.tokens, "every_tokens": self.every_tokens}
        clock |= {"enough": self.enough, "hardest": HARDEST}
        last = stages({"class_path": "timed.TokenClock", "init_args": clock})
        merged = merge([base, common, self.arm.overlay, last])
        model = str(warm_model(folder.resolve(), self.seed))
        return yaml.safe_load(yaml.safe_dump(merged).replace("runs/quickstart/warm_start/model", model))
