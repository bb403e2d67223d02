import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sppo_lightning import SPPOModule
from sppo_lightning.advantages import SequenceAdvantage
from sppo_lightning.callbacks import MathVerifier, RolloutGeneration
from sppo_lightning.cli import command_line, main
from sppo_lightning.objectives import TokenClipObjective

ROOT = Path(__file__).resolve().parents[1]
ALL = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in ALL if {"model", "data"} <= {*yaml.safe_load(path.read_text())}]  # others are overlays
DATA = ROOT.parent / "shared" / "data"  # beside the repository, where there is one
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = ["Find the remainder when $2^{10}$ is divided by 7.", "What is 3 + 4?", "Compute the area of the triangle."]


def save_tiny_model(folder: Path, texts: list[str], vocab: int, hidden: int, template: str | None = None) -> str:
    """A random Qwen2 and a byte-level BPE tokenizer trained on `texts`, as a Hugging Face folder."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=vocab, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * hidden,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_num_threads(1)


@pytest.fixture
def with_tiny_models(in_an_empty_folder: Path) -> Callable[[Path], dict[str, Any]]:
    """A config with every model that it names by folder or hub id replaced by a tiny one."""

    def load(path: Path) -> dict[str, Any]:
        tiny = save_tiny_model(in_an_empty_folder / "tiny", TEXTS, vocab=280, hidden=16)
        config = yaml.safe_load(path.read_text())
        settings = config["model"]["init_args"]
        for name in ("policy", "critic"):
            model = settings.get(name, {}).get("init_args", {})
            model |= {key: tiny for key in ("pretrained", "tokenizer") if key in model}
        return config

    return load


def built(config: dict[str, Any]) -> Any:
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return command_line(["--config", "config.yaml"], run=False)


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT / "configs")) for path in CONFIGS])
def test_every_config_builds(path: Path, with_tiny_models: Callable[[Path], dict[str, Any]]):
    cli = built(with_tiny_models(path))
    cli.model.configure_model()
    modules = {"policy": cli.model.policy, "critic": getattr(cli.model, "critic", None)}
    for module in filter(None, modules.values()):
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert cli.trainer.callbacks
    assert cli.datamodule.validation_names


DISTILL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-"
COLUMNS = [
    "policy",
    "critic",
    "batch",
    "mini_batch",
    "policy_lr",
    "weight_decay",
    "critic_lr",
    "prompt_tokens",
    "response_tokens",
    "steps",
]
PAPER = {  # the paper's settings
    "sppo_1.5b_deepscaler": ("1.5B", "1.5B", 256, 128, 1e-6, 0.01, 5e-6, 1024, 8192, 1000),
    "sppo_7b_dapo": ("7B", "7B", 512, 32, 1e-6, 0.1, 1e-5, 2048, 8192, 200),
    "sppo_7b_dapo_small_critic": ("7B", "1.5B", 512, 32, 1e-6, 0.1, 1e-5, 2048, 8192, 200),
}


PAPER_SETS = ["aime24", "aime25", "amc23", "math500", "minerva"]
INSTRUCTION = r"Please output the final answer within \boxed{}."


def test_the_papers_configs_are_these():
    assert {path.stem for path in CONFIGS if path.parent.name == "paper"} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name: str, in_an_empty_folder: Path):
    cli = built(yaml.safe_load((ROOT / f"configs/paper/{name}.yaml").read_text()))
    expected = dict(zip(COLUMNS, PAPER[name], strict=True))
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    rollout = next(c for c in trainer.callbacks if isinstance(c, RolloutGeneration))
    assert expected == {
        "policy": module.policy.pretrained.removeprefix(DISTILL),
        "critic": module.critic.pretrained.removeprefix(DISTILL),
        "batch": data.batch_size,
        "mini_batch": module.mini_batch_size,
        "policy_lr": module.policy_optimizer.lr,
        "weight_decay": module.policy_optimizer.weight_decay,
        "critic_lr": module.critic_optimizer.lr,
        "prompt_tokens": data.max_prompt_tokens,
        "response_tokens": rollout.sampling.max_new_tokens,
        "steps": trainer.max_steps * module.mini_batch_size // data.batch_size,
    }
    assert rollout.sampling.temperature == rollout.validation.temperature == 0.6
    assert (rollout.sampling.samples_per_prompt, rollout.validation.samples_per_prompt) == (1, 16)
    assert (rollout.sampling.top_p, rollout.sampling.top_k) == (1.0, 0)
    assert (module.kl_coef, module.lr_schedule, module.policy_optimizer.warmup_updates) == (0.0, "constant", 0)
    assert isinstance(module, SPPOModule)
    assert isinstance(module.advantage, SequenceAdvantage)
    assert isinstance(module.objective, TokenClipObjective)
    clips = module.objective.clip_low, module.objective.clip_high, module.objective.dual_clip
    assert (*clips, module.objective.aggregation) == (0.2, 0.2, 3.0, "token-mean")
    assert module.policy.gradient_checkpointing
    assert module.critic.gradient_checkpointing
    assert trainer.precision == "bf16-mixed"
    assert data.validation == {name: f"data/{name}.parquet" for name in PAPER_SETS}
    assert any(isinstance(c, MathVerifier) for c in trainer.callbacks)
    assert any(isinstance(c, ModelCheckpoint) for c in trainer.callbacks)
    assert isinstance(trainer.logger, TensorBoardLogger)


def test_deepscaler_is_read_by_its_own_columns(in_an_empty_folder: Path):
    config = yaml.safe_load((ROOT / "configs/paper/sppo_1.5b_deepscaler.yaml").read_text())
    source = built(config).datamodule.train
    assert source.path == "agentica-org/DeepScaleR-Preview-Dataset"
    assert source.columns == {"prompt": "problem", "answer": "answer"}


def test_each_prompt_has_the_instruction_once(with_tiny_models: Callable[[Path], dict[str, Any]]):
    config = with_tiny_models(ROOT / "configs/paper/sppo_1.5b_deepscaler.yaml")
    turns = [{"role": "user", "content": f"What is 1 + 2? {INSTRUCTION}"}]
    rows = {
        "train": {"problem": "What is 1 + 1?", "solution": "Count.", "answer": "2"},
        "aime24": {"prompt": turns, "reward_model": {"ground_truth": "3"}},
    }
    for name, row in rows.items():
        pq.write_table(pa.Table.from_pylist([row]), f"{name}.parquet")
    settings = config["data"]["init_args"]
    settings |= {"batch_size": 1, "validation": {"aime24": "aime24.parquet"}}
    settings["train"]["init_args"]["path"] = "train.parquet"
    config["trainer"]["accelerator"] = "cpu"
    cli = built(config)
    cli.datamodule.trainer = cli.trainer
    cli.trainer.strategy.connect(cli.model)
    cli.datamodule.setup("fit")
    texts = [each.prompts[0].text for each in (cli.datamodule.train_dataloader(), *cli.datamodule.val_dataloader())]
    assert texts == [f"What is 1 + {n}? {INSTRUCTION}" for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA.parent.name}/{DATA.name} beside the repository")
def test_two_iterations_of_the_small_critic_run_on_its_own_data(
    in_an_empty_folder: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = pq.read_table(DATA / "dapo-math-17k.parquet", columns=["prompt"]).slice(0, 400).to_pylist()
    texts = [turn["content"] for row in prompts for turn in row["prompt"]]
    policy = save_tiny_model(in_an_empty_folder / "policy", texts, vocab=600, hidden=32, template=CHAT_TEMPLATE)
    critic = save_tiny_model(in_an_empty_folder / "critic", texts, vocab=400, hidden=16)
    Path("data").symlink_to(DATA)
    config = yaml.safe_load((ROOT / "configs/paper/sppo_7b_dapo_small_critic.yaml").read_text())
    shorten(config, policy, critic)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml"])

    folder = Path("runs/paper/sppo_7b_dapo_small_critic")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["iterations"], summary["updates"]) == (2, 32)
    for name in ("math500", "aime25"):
        for validation in (summary["validations"][0], summary["validations"][-1]):
            rates = [validation["metrics"][f"val/{name}/{kind}@4"] for kind in ("avg", "pass")]
            assert 0 <= rates[0] <= rates[1] <= 1
    for before, after in ((policy, folder / "model"), (critic, folder / "model/critic")):
        old, new = (load_file(Path(place) / "model.safetensors") for place in (before, after))
        body = [key for key in old if key in new and "norm" not in key]
        assert len(body) > 10
        moved = {key: (old[key] - new[key]).abs().max().item() for key in body}
        # AdamW moves a weight by at most about the learning rate in each of the 32 updates
        rate = 1e-6 if before == policy else 1e-5
        assert all(0 < change < 2 * 32 * rate for change in moved.values()), moved
    policy_vocabulary, critic_vocabulary = (
        PreTrainedTokenizerFast.from_pretrained(place).get_vocab()
        for place in (folder / "model", folder / "model/critic")
    )
    assert len(policy_vocabulary) != len(critic_vocabulary)

    capsys.readouterr()
    main(["validate", "--config", "config.yaml"])
    table = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in capsys.readouterr().out.split("\n")
    ]
    assert any({"metric", "math500", "aime25"} <= set(cells) for cells in table)
    assert {"avg@4", "pass@4"} <= {cells[0] for cells in table if cells}


def shorten(config: dict[str, Any], policy: str, critic: str) -> None:
    """Two iterations with tiny models and short responses; batch sizes, rates and precision stay the paper's."""
    settings = config["model"]["init_args"]
    settings["policy"]["init_args"]["pretrained"] = policy
    settings["critic"]["init_args"]["pretrained"] = critic
    sets = config["data"]["init_args"]["validation"]
    config["data"]["init_args"] |= {
        "validation_batch_size": 4,
        "validation": {name: path for name, path in sets.items() if Path(path).exists()},
    }
    iteration = config["data"]["init_args"]["batch_size"] // settings["mini_batch_size"]
    config["trainer"] |= {"accelerator": "cpu", "max_steps": 2 * iteration, "limit_val_batches": 2}
    rollout = next(c for c in config["trainer"]["callbacks"] if c["class_path"].endswith("RolloutGeneration"))
    validation = copy.deepcopy(rollout["init_args"]["sampling"]) | {"samples_per_prompt": 4, "max_new_tokens": 8}
    rollout["init_args"] |= {"validation": validation}
    rollout["init_args"]["sampling"]["max_new_tokens"] = 8
