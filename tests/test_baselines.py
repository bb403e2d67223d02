"""Every baseline as a small config on top of the quickstart's: two iterations through the real command line."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sppo_lightning.cli import command_line
from sppo_lightning.config_files import merge, read
from sppo_lightning.models import TinyPolicy

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "quickstart" / "sppo.yaml"
OVERLAYS = sorted((ROOT / "configs" / "baselines").glob("*.yaml"))
PROMPTS = 4
EXPECTED = {  # what the article, or the paper of the algorithm, is known by
    "batch_mean": {"advantage": "BatchMeanAdvantage", "critic": None, "samples": 1},
    "cispo": {"objective": "ImportanceWeightedObjective", "advantage": "GroupAdvantage", "samples": 8},
    "dapo": {"advantage": "GroupAdvantage", "critic": None, "samples": 8},
    "dr_grpo": {"advantage": "GroupAdvantage", "critic": None, "samples": 8},
    "grpo": {"advantage": "GroupAdvantage", "objective": "TokenClipObjective", "critic": None, "samples": 8},
    "gspo": {"objective": "SequenceClipObjective", "advantage": "GroupAdvantage", "samples": 8},
    "ppo": {"advantage": "GAE", "critic": "TokenCritic", "critic_objective": "ClippedSquaredError"},
    "ppo_bce": {"advantage": "GAE", "critic": "TokenCritic", "critic_objective": "BinaryCrossEntropy"},
    "remax": {"advantage": "GreedyBaselineAdvantage", "critic": None, "samples": 1},
    "rloo": {"advantage": "LeaveOneOutAdvantage", "critic": None, "samples": 5},
    "sppo_adaptive": {"advantage": "PooledAdvantage", "critic": "PromptCritic", "samples": 1},
    "sppo_critic_replay": {
        "advantage": "SequenceAdvantage",
        "critic": "PromptCritic",
        "critic_replay": "CriticReplay",
    },
    "sppo_decoupled_critic": {"advantage": "SequenceAdvantage", "critic": "CharacterCritic", "samples": 1},
    "sppo_gated": {"advantage": "SequenceAdvantage", "critic": "PromptCritic", "critic_warmup": "CriticWarmup"},
    "sppo_hybrid": {"advantage": "HybridAdvantage", "critic": "TokenCritic", "samples": 1},
    "sppo_off_policy": {"objective": "ImportanceWeightedObjective", "critic": "PromptCritic", "samples": 1},
    "sppo_sequence_ratio": {"objective": "SequenceClipObjective", "critic": "PromptCritic", "samples": 1},
    "sppo_sequence_ratio_length": {"objective": "SequenceClipObjective", "critic": "PromptCritic", "samples": 1},
    "sppo_shrinkage": {"advantage": "ShrunkSequenceAdvantage", "critic": "PromptCritic", "samples": 1},
    "sppo_small_critic": {"advantage": "SequenceAdvantage", "critic": "PromptCritic", "samples": 1},
}


@pytest.fixture
def warm_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A policy with random weights where the quickstart's warm start would be."""
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    words = read(str(BASE.with_name("sft.yaml")))["model"]["init_args"]["policy"]["init_args"]["words"]
    torch.manual_seed(0)
    policy = TinyPolicy(words, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
    policy.build()
    policy.model.save_pretrained("runs/quickstart/warm_start/model")
    policy.tokenizer.save_pretrained("runs/quickstart/warm_start/model")


def small(overlay: Path) -> dict[str, Any]:
    """The overlay on its base, for four prompts and an untrained policy; what makes it that algorithm stays."""
    config: Any = merge([read(str(BASE)), read(str(overlay))])
    settings = config["model"]["init_args"]
    updates = config["data"]["init_args"]["batch_size"] / settings["mini_batch_size"]
    config["data"]["init_args"] |= {"batch_size": PROMPTS, "validation": {}}
    config["data"]["init_args"]["train"]["init_args"]["size"] = 64
    settings["mini_batch_size"] = round(PROMPTS / updates)
    settings["policy_optimizer"]["warmup_updates"] = 0
    trainer = config["trainer"]
    trainer |= {"max_time": None, "max_epochs": 1, "limit_train_batches": 2, "logger": False}
    kept = ("RolloutGeneration", "ReferenceRefresh", "LengthPenalty", "DynamicSampling", "AdaptiveSamples")
    stages = [entry for entry in trainer["callbacks"] if entry["class_path"].endswith(kept)]
    half_right = {"class_path": "tiny.AnyDigit"}  # so that a policy with random weights has something to learn
    trainer["callbacks"] = [stages[0], half_right, *stages[1:]]
    return config


def test_each_overlay_says_here_what_it_is_known_by():
    assert {path.stem for path in OVERLAYS} == set(EXPECTED)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("warm_start")
@pytest.mark.parametrize("overlay", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_two_iterations_of_every_baseline(overlay: Path):
    known = EXPECTED[overlay.stem]
    config = small(overlay)
    if config["model"]["init_args"].get("critic_warmup"):
        config["model"]["init_args"]["critic_warmup"] = {"updates": 1, "max_updates": 1}
    samples = known.get("samples", 1)
    config["model"]["init_args"]["mini_batch_size"] = PROMPTS // 2 * samples
    cli = command_line(["--config", yaml.safe_dump(config)], run=False)
    module = cli.model
    for name in ("advantage", "objective", "critic", "critic_objective", "critic_replay", "critic_warmup"):
        if name in known:
            part = getattr(module, name)
            assert (None if part is None else type(part).__name__) == known[name]
    before = {}

    def remember() -> None:
        before.update({name: p.detach().clone() for name, p in module.named_parameters()})

    module.on_fit_start = remember
    cli.trainer.fit(module, cli.datamodule)
    assert cli.trainer.global_step == 4  # two iterations of two updates
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert [n for n, v in metrics.items() if not math.isfinite(v)] == []
    assert 0 < metrics["reward/mean"] < 1
    assert metrics["advantage/nonzero_fraction"] > 0
    moved = {n.split(".")[0] for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert {"policy"} <= moved <= {"policy", "critic", "reference"}
    assert ("critic" in moved) == (module.critic is not None)
    assert ("reference" in moved) == ("ReferenceRefresh" in str(config["trainer"]["callbacks"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("warm_start")
def test_two_iterations_with_adapters_whose_reference_is_the_base_model():
    config = small(ROOT / "configs" / "lora.yaml")
    settings = config["model"]["init_args"]
    settings |= {"kl_coef": 0.1, "mini_batch_size": PROMPTS // 2, "lr_schedule": "constant"}
    settings["policy_optimizer"]["lr"] = 0.01
    cli = command_line(["--config", yaml.safe_dump(config)], run=False)
    module: Any = cli.model
    assert module.policy.lora.rank == module.critic.lora.rank == 32
    kl, bare, before = [], [], {}
    penalty, fit_start = module.kl_loss, module.on_fit_start

    def remember() -> None:
        fit_start()
        before.update({name: p.detach().clone() for name, p in module.named_parameters()})

    def record(*args: Any) -> torch.Tensor:
        kl.append(float(penalty(*args)))
        return penalty(*args)

    def look(*_: Any, **__: Any) -> None:
        bare.extend(name for name, p in module.named_parameters() if "lora" not in name and p.grad is not None)

    module.on_fit_start, module.kl_loss, module.on_before_optimizer_step = remember, record, look
    cli.trainer.fit(module, cli.datamodule)
    assert cli.trainer.global_step == 4 <= len(kl)
    assert kl[0] == 0
    assert min(kl[1:]) > 1e-6
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert set(bare) == {n for n in moved if "lora" not in n} == {"critic.model.score.weight"}
    assert {n.split(".")[0] for n in moved if "lora_B" in n} == {"policy", "critic"}
    assert not any(name.startswith("reference") for name in module.state_dict())
