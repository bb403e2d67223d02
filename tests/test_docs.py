"""The Python of the documentation runs as it stands, and does what is said beside it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from by_hand import ByHand, assert_equal, run
from given import outcomes
from test_configs import CHAT_TEMPLATE, TEXTS, save_tiny_model
from tiny_config import EXACT, ROLLOUT, write_files

from sppo_lightning.batch import Prompt
from sppo_lightning.calibration import confidence_metrics
from sppo_lightning.callbacks import (
    AdaptiveSamples,
    CodeVerifier,
    CollapseMonitor,
    CompletionLog,
    ExactMatch,
    FormatVerifier,
    HackingMonitor,
    LengthPenalty,
    PolicyCalibration,
    RewardModelVerifier,
    SearchHopeless,
    StepQuality,
    SuccessReplay,
)
from sppo_lightning.cli import command_line, main
from sppo_lightning.collapse import CollapseLimits
from sppo_lightning.data import PassRateCurriculum, SolvabilityCurriculum, StagedCurriculum
from sppo_lightning.engines import TreeSearchEngine
from sppo_lightning.found_losses import Demonstrations, OffPolicySamples
from sppo_lightning.pooling import PooledAdvantage
from sppo_lightning.uncertainty import CriticVariance
from sppo_lightning.verification.drift import Limits

ROOT = Path(__file__).resolve().parents[1]


def block_of(page: str, language: str, marker: str) -> str:
    """The page's one block of a language with `marker` in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if marker in block]
    return block


def names_in(page: str, marker: str) -> dict[str, Any]:
    """What the page's Python block with `marker` defines."""
    names: dict[str, Any] = {}
    exec(block_of(page, "python", marker), names)
    return names


def test_an_advantage_of_ones_own():
    advantage = names_in("docs/algorithms.md", "HalfBaseline")["HalfBaseline"]()
    assert advantage(outcomes([(0, 1.0, 0.0), (1, 0.0, 0.0)])).tolist() == [0.75, -0.25]
    module, _ = run(advantage=advantage)
    hand = ByHand()
    for row in hand.rows:
        row["V"] = row["V"] / 2
    policy, _ = hand.policy_losses(hand.rows)
    policy.backward()
    ours = {name: g for name, g in module.gradients[0].items() if name.startswith("policy.")}
    assert_equal(ours, {f"policy.{name}": p.grad for name, p in hand.policy.named_parameters()})


@pytest.mark.parametrize(("page", "name"), [("README.md", "CountsVowels"), ("docs/verifiers.md", "Brief")])
def test_a_verifier_of_ones_own(page: str, name: str):
    verifier = names_in(page, f"class {name}")[name]()
    scores = verifier.score([Prompt("", "", "any", 0)] * 2, ["aeiou", "xyz" * 100])
    assert scores == ([1.0, 0.0] if name == "CountsVowels" else [0.975, 0.0])


def callbacks_built(
    marker: str, monkeypatch: pytest.MonkeyPatch, folder: Path, page: str = "docs/verifiers.md"
) -> list[Any]:
    """The callbacks of the page's YAML block with `marker`, built by the command line."""
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(folder)
    write_files({"trainer.callbacks": yaml.safe_load(block_of(page, "yaml", marker))["callbacks"]})
    return command_line(["--config", "config.yaml"], run=False).trainer.callbacks


def only(kind: type, callbacks: list[Any]) -> Any:
    (found,) = [callback for callback in callbacks if isinstance(callback, kind)]
    return found


def test_the_pages_reward_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    learned = only(RewardModelVerifier, callbacks_built("RewardModelVerifier", monkeypatch, tmp_path))
    assert (learned.role, learned.squash, learned.weight, learned.dtype) == ("shaping", False, 0.05, "bfloat16")


def test_the_pages_form_length_and_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    callbacks = callbacks_built("FormatVerifier", monkeypatch, tmp_path)
    form = only(FormatVerifier, callbacks)
    responses = [
        r"<think>so</think>\boxed{5}",
        r"\boxed{5}",
        r"<think>as an AI</think>\boxed{5}",
        "<think>so</think>5",
    ]
    assert form.score([Prompt("", "", "any", 0)] * 4, responses) == [1.0, 0.0, 0.0, 0.0]
    penalty = only(LengthPenalty, callbacks)
    limit = penalty.max_response_tokens
    assert [penalty.curve.value(n, limit, False) for n in (7168, 7680, 8192)] == [0.0, -0.5, -1.0]
    steps = only(StepQuality, callbacks)
    assert (steps.weight, steps.role, steps.only_if_correct) == (0.2, "shaping", True)


def test_a_step_scorer_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "my_verifiers.py").write_text(block_of("docs/verifiers.md", "python", "class NoGuessing"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_verifiers", raising=False)
    steps = only(StepQuality, callbacks_built("my_verifiers.NoGuessing", monkeypatch, tmp_path))
    response = "I guess so.\n1 + 1 = 2\n1 + 2 = 4\nDone."
    assert steps.score([Prompt("", "", "any", 0)], [response]) == [2.5 / 4]


def test_the_pages_monitor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monitor = only(
        HackingMonitor, callbacks_built("name: strict", monkeypatch, tmp_path, page="docs/reward-hacking.md")
    )
    (check,) = monitor.checks
    assert isinstance(check, ExactMatch)
    assert check.name == "strict"
    assert monitor.limits == Limits(spam_growth=None)
    assert monitor.stop_on_alarm


def test_the_pages_collapse_monitor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    page = "docs/when-it-goes-wrong.md"
    monitor = only(CollapseMonitor, callbacks_built("CollapseMonitor", monkeypatch, tmp_path, page=page))
    assert monitor.collapse.limits == CollapseLimits(length_growth=None)
    windows = {metric: series.window for metric, series in monitor.collapse.series.items()}
    default = {metric: series.window for metric, series in CollapseMonitor().collapse.series.items()}
    assert windows == default
    assert (windows["reward/mean"], windows["critic/brier_skill"], windows["policy/entropy"]) == (5, 50, 10)
    rows = re.findall(r"`(\w+)`[^|]* \| ([0-9.]+) \|$", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert {name: float(value) for name, value in rows} == vars(CollapseLimits())


def test_the_pages_curricula(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    write_files({"data.init_args.shuffle": True})
    page = (ROOT / "docs/curricula.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert yaml.safe_load(blocks[0]) == yaml.safe_load((ROOT / "configs/curriculum.yaml").read_text())
    for kind, block in zip((SolvabilityCurriculum, PassRateCurriculum, StagedCurriculum), blocks, strict=True):
        (tmp_path / "overlay.yaml").write_text(block)
        found = command_line(["-c", "config.yaml", "-c", "overlay.yaml"], run=False).datamodule.curriculum
        assert type(found) is kind
        settings = yaml.safe_load(block)["data"]["init_args"]["curriculum"]["init_args"]
        assert {name: getattr(found, name) for name in settings} == settings
        assert {name: value for name, value in vars(kind()).items() if name != "column"}.items() <= vars(
            found
        ).items()
    cli = command_line(["fit", "-c", "config.yaml", "-c", str(ROOT / "configs/curriculum.yaml")])
    assert {f"curriculum/{name}" for name in ("coverage", "expected_pass_rate")} <= {*cli.trainer.callback_metrics}
    assert cli.trainer.callback_metrics["curriculum/coverage"] == 1.0


def test_the_pages_adaptive_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    block = block_of("docs/adaptive-samples.md", "yaml", "AdaptiveSamples")
    overlay = ROOT / "configs/baselines/sppo_adaptive.yaml"
    assert yaml.safe_load(block) == yaml.safe_load(overlay.read_text())
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    write_files({})
    cli = command_line(["fit", "-c", "config.yaml", "-c", str(overlay)])
    found = only(AdaptiveSamples, cli.trainer.callbacks)
    assert (found.budget_tokens, found.max_samples, type(found.uncertainty)) == (14000, 8, CriticVariance)
    plain, pooled = PooledAdvantage(), cli.model.advantage
    for setting in ("estimate", "running_decay"):
        assert getattr(pooled, setting) == getattr(plain, setting)
    names = re.findall(r"`((?:adaptive|critic)/\w+)`", (ROOT / "docs/adaptive-samples.md").read_text())
    assert {*names} <= {*cli.trainer.callback_metrics}
    assert cli.trainer.callback_metrics["adaptive/samples_per_prompt"] == 8.0


def test_the_pages_first_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    write_files({})
    overlay = ROOT / "configs/exploration.yaml"
    block = block_of("docs/exploration.md", "yaml", "critic_warmup")
    assert yaml.safe_load(block) == yaml.safe_load(overlay.read_text())
    cli = command_line(["fit", "-c", "config.yaml", "-c", str(overlay)])
    warmup, replay = cli.model.critic_warmup, only(SuccessReplay, cli.trainer.callbacks)
    assert (warmup.updates, warmup.floors["critic/brier_skill"], warmup.max_updates) == (10, 0.0, 60)
    assert (replay.below, replay.rows, replay.coef) == (0.5, 128, 0.3)
    assert "replay/stored" in cli.trainer.callback_metrics


def test_the_pages_policy_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    page = "docs/calibration.md"
    found = only(PolicyCalibration, callbacks_built("PolicyCalibration", monkeypatch, tmp_path, page=page))
    default = PolicyCalibration()
    assert found.path == Path("runs/my")
    for setting in ("tokens", "bins", "every_n_validations"):
        assert getattr(found, setting) == getattr(default, setting)
    rows = re.findall(r"^\| (`[`\w, ]+`) \| (?:[01]|equal) \|", (ROOT / page).read_text(), flags=re.MULTILINE)
    pair = torch.tensor([0.5, 0.75]), torch.tensor([0.0, 1.0])
    assert [name.strip("`") for row in rows for name in row.split(", ")] == list(confidence_metrics(*pair))


def test_the_pages_hidden_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    callbacks = callbacks_built("cases: hidden", monkeypatch, tmp_path, page="docs/reward-hacking.md")
    (check,) = only(HackingMonitor, callbacks).checks
    assert (check.name, check.cases) == ("hidden_cases", "hidden")
    assert check.hidden_share == only(CodeVerifier, callbacks).hidden_share == 0.3


def test_the_pages_routes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "my_verifiers.py").write_text(block_of("docs/verifiers.md", "python", "class Brief"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_verifiers", raising=False)
    callbacks = callbacks_built("applies_to", monkeypatch, tmp_path)
    (brief,) = [each for each in callbacks if type(each).__name__ == "Brief"]
    assert brief.only_if_correct
    assert only(CodeVerifier, callbacks).applies_to == ("livecode",)


def test_the_pages_completions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    callbacks = callbacks_built("CompletionLog", monkeypatch, tmp_path, page="docs/exports.md")
    log, default = only(CompletionLog, callbacks), CompletionLog()
    assert [log.every_n_iterations, log.max_iterations, log.max_bytes] == [
        default.every_n_iterations,
        default.max_iterations,
        default.max_bytes,
    ]
    keeper = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    keeper["init_args"] = {"dirpath": "runs/my/checkpoints", "save_last": True}
    written = {"class_path": "sppo_lightning.callbacks.CompletionLog", "init_args": {"path": "runs/my/rollouts"}}
    callbacks = [ROLLOUT, EXACT, written, keeper]
    write_files({"trainer.callbacks": callbacks, "trainer.enable_checkpointing": True})
    main(["fit", "--config", "config.yaml"])
    main(["export", "--ckpt", "runs/my/checkpoints/last.ckpt", "--to", "runs/my/model"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    columns = set(re.findall(r"^\| (`[\w/<>`, ]+) \|", (ROOT / "docs/exports.md").read_text(), flags=re.MULTILINE))
    named = {name.strip("`").replace("<verifier>", "exact_match") for row in columns for name in row.split(", ")}
    rollouts = names_in("docs/exports.md", "load_dataset")["rollouts"]
    assert len(rollouts) == 4
    assert set(rollouts.column_names) <= named
    models = names_in("docs/exports.md", "AutoModelForCausalLM")
    assert models["critic"].config.id2label == {0: "solvable"}
    Path("config.yaml").unlink()
    names_in("docs/exports.md", 'checkpoint["config"]')
    main(["validate", "--config", "config.yaml", "--data.validation={few: train.jsonl}"])


def test_the_monitors_defaults_are_those_of_the_table():
    rows = re.findall(
        r"\| `(\w+)`[^|]*\| ([0-9.]+) \|$", (ROOT / "docs/reward-hacking.md").read_text(), flags=re.MULTILINE
    )
    assert {name: float(value) for name, value in rows} == vars(Limits())


def rows_file(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_warm_start_from_the_first_step_to_the_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "critic"):
        save_tiny_model(Path("models") / f"my-{name}", TEXTS, vocab=280, hidden=16, template=CHAT_TEMPLATE)
    for name, marker in (("my", "# my.yaml"), *((n, f"# {n}.yaml") for n in ("warm_start", "reinforce", "reject"))):
        page = "docs/own-model-and-data.md" if name == "my" else "docs/warm-start.md"
        Path(f"{name}.yaml").write_text(block_of(page, "yaml", marker))
    chats = [
        [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": str(i + 1)}] for i in range(64)
    ]
    rows_file("data/demonstrations.jsonl", [{"messages": chat} for chat in chats])
    rows_file("data/held_out_demonstrations.jsonl", [{"prompt": "7 + 1?", "completion": "8"}])
    for name in ("train", "held_out"):
        rows_file(f"data/{name}.jsonl", [{"question": f"{i} + 1?", "final": str(i + 1)} for i in range(64)])
    quick = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", "warm_start.yaml", *quick, "--trainer.val_check_interval=1"])
    assert Path("runs/warm/model/model.safetensors").is_file()
    short = {"class_path": "RolloutGeneration", "init_args": {"sampling": {"max_new_tokens": 2}}}
    shorter = ["--config", json.dumps({"trainer": {"callbacks": [short]}})]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "my.yaml", "--config", "reinforce.yaml", *shorter, *quick])
    assert "64 responses to 64 training prompts" in (said := capsys.readouterr().err)
    assert "below `WarmStartGate.min_pass_rate`=0.05" in said
    logged = {"dataset": "train", "row": 0, "prompt": "<|user|>5 + 1?<|assistant|>", "gold": "6", "response": "6"}
    more = {"finish_reason": "stop", "response_tokens": 2, "reward": 1.0, "iteration": 1}
    table = pa.Table.from_pylist([logged | more | {"row": row} for row in range(32)])
    pq.write_table(table, "runs/my/rollouts/iteration-000001.rank0.parquet")
    again = ["--model.policy.pretrained=runs/warm/model", "--trainer.max_steps=1"]
    main(["fit", "--config", "warm_start.yaml", "--config", "reject.yaml", *quick, *again])
    assert Path("runs/rejection/model/model.safetensors").is_file()


def test_the_pages_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    stage = only(SearchHopeless, callbacks_built("SearchHopeless", monkeypatch, tmp_path, page="docs/search.md"))
    assert isinstance(stage.search, TreeSearchEngine)
    assert (stage.search.engine, stage.search.step_end, stage.below) == (None, ("\n\n",), 0.05)
    assert isinstance(stage.loss, Demonstrations)


def test_the_pages_replay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    stage = only(SuccessReplay, callbacks_built("SuccessReplay", monkeypatch, tmp_path, page="docs/search.md"))
    assert isinstance(stage.loss, OffPolicySamples)
    plain = SuccessReplay()  # the page shows the defaults
    names = ("below", "rows", "coef", "half_life_iterations")
    assert [getattr(stage, name) for name in names] == [getattr(plain, name) for name in names]
    assert (vars(stage.store), vars(stage.records)) == (vars(plain.store), vars(plain.records))
    assert stage.loss.max_weight == OffPolicySamples().max_weight
