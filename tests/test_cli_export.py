"""`export` of what `fit` has saved: the folders that HFExport would have written, or one sentence."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from peft import PeftModel
from tiny_config import EXACT, ROLLOUT, TINY, write_files
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from sppo_lightning.cli import main
from sppo_lightning.models.tiny import word_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} b{% endfor %}"
IDS = torch.tensor([[3, 4, 5, 6]])
KEEPER = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"dirpath": "kept", "save_last": True},
}
WHOLE = {"class_path": "sppo_lightning.callbacks.HFExport", "init_args": {"path": "ended"}}
OPTIMIZERS = {f"model.init_args.{name}_optimizer": {"lr": 0.05} for name in ("policy", "critic")}
LORA = {f"model.init_args.{name}.init_args.lora": {"rank": 2} for name in ("policy", "critic")}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["sppo_lightning"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["export", *arguments])
        assert exit_.value.code == 2
        said = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
        assert said.startswith("error: ")
        return said.removeprefix("error: ")

    return run


def fit(changes: dict[str, Any] | None = None, *callbacks: Any, arguments: tuple[str, ...] = ()) -> None:
    """Two updates, with a checkpoint in `kept` after the last."""
    trainer = {"trainer.enable_checkpointing": True, "trainer.callbacks": [ROLLOUT, EXACT, *callbacks, KEEPER]}
    epochs = {"trainer.max_epochs": 2, "data.init_args.validation": {"held_out": "train.jsonl"}}
    write_files({**trainer, **epochs, **OPTIMIZERS, **(changes or {})}, tokenizer={"chat_template": TEMPLATE})
    main(["fit", "--config", "config.yaml", *arguments])


def weights_of(part: str) -> dict[str, torch.Tensor]:
    """As the checkpoint holds them."""
    state = torch.load("kept/last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix(f"{part}.model."): w for name, w in state.items() if name.startswith(f"{part}.")}


def contents(folder: str) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


@pytest.mark.parametrize("changes", [{}, LORA], ids=["whole", "lora"])
def test_an_export_is_what_the_end_of_the_run_leaves(changes: dict[str, Any]):
    fit(changes, WHOLE)
    main(["export", "--ckpt=kept/last.ckpt", "--to=out"])
    expected, found = contents("ended"), contents("out")
    assert expected.keys() == found.keys()
    assert {"config.json", "generation_config.json", "README.md", "chat_template.jinja", "critic/README.md"} <= {
        *found
    }
    assert "adapter/adapter_model.safetensors" in found or not changes
    for name in ("adapter/README.md", "critic/adapter/README.md") if changes else ():
        assert b"library_name: peft" in found[name]
    assert [name for name in expected if expected[name] != found[name]] == []


def test_the_folders_load_as_the_models_that_were_trained():
    fit()
    main(["export", "--ckpt=kept/last.ckpt", "--to=out"])
    config = Qwen2Config(**TINY, vocab_size=7, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    for auto, own, part, folder in (
        (AutoModelForCausalLM, Qwen2ForCausalLM(config), "policy", "out"),
        (
            AutoModelForSequenceClassification,
            Qwen2ForSequenceClassification(Qwen2Config(**config.to_dict() | {"num_labels": 1})),
            "critic",
            "out/critic",
        ),
    ):
        own.load_state_dict(weights_of(part))
        loaded = auto.from_pretrained(folder)
        assert torch.equal(loaded(IDS).logits, own.eval()(IDS).logits)
        assert loaded(IDS).logits.abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained("out")
    turns = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "a b"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


def test_adapters_alone_and_merged():
    write_files({}, tokenizer={})
    for name, auto, kind in (
        ("base", Qwen2ForCausalLM, {}),
        ("seed", Qwen2ForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(1)
        auto(
            Qwen2Config(**TINY, vocab_size=7, eos_token_id=1, pad_token_id=0, bos_token_id=None, **kind)
        ).save_pretrained(name)
        word_tokenizer(["a", "b", "c", "d"]).save_pretrained(name)
    models = {
        "policy": {"pretrained": "base", "lora": {"rank": 2}},
        "critic": {"pretrained": "seed", "lora": {"rank": 2}},
    }
    fit({f"model.init_args.{name}.init_args": settings for name, settings in models.items()})
    main(["export", "--ckpt=kept/last.ckpt", "--to=whole", "--adapters=merged"])
    main(["export", "--ckpt=kept/last.ckpt", "--to=small", "--adapters=alone"])
    assert not list(Path("whole").rglob("adapter*"))
    assert not list(Path("small").rglob("model.safetensors"))
    for auto, base, folder in (
        (AutoModelForCausalLM, "base", "."),
        (AutoModelForSequenceClassification, "seed", "critic"),
    ):
        whole, start = auto.from_pretrained(Path("whole") / folder), auto.from_pretrained(base)
        untrained = start(IDS).logits
        small = PeftModel.from_pretrained(start, str(Path("small") / folder))
        torch.testing.assert_close(small(input_ids=IDS).logits, whole(IDS).logits, atol=1e-6, rtol=0)
        assert (whole(IDS).logits - untrained).abs().max() > 1e-3
        card = (Path("small") / folder / "README.md").read_text()
        assert "library_name: peft" in card
        assert f'base = {auto.__name__}.from_pretrained("{base}"' in card


def test_adapters_beside_weights_in_4_bits():
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes misreads others on CPUs
    Qwen2ForCausalLM(Qwen2Config(**TINY | sizes, vocab_size=7, eos_token_id=1, pad_token_id=0)).save_pretrained(
        "base"
    )
    word_tokenizer(["a", "b", "c", "d"]).save_pretrained("base")
    lora = {"rank": 2, "load_in_4bit": True}
    fit({"model.init_args.policy.init_args": {"pretrained": "base", "lora": lora}}, WHOLE)
    main(["export", "--ckpt=kept/last.ckpt", "--to=out"])
    expected, found = contents("ended"), contents("out")
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    merged, base = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("out", "base"))
    moved = [name for name in base if not torch.equal(merged[name], base[name])]
    assert moved
    assert all("_proj" in name for name in moved)


def test_a_base_model_that_has_moved_or_changed(refused: Callable[..., str]):
    write_files({})
    Qwen2ForCausalLM(Qwen2Config(**TINY, vocab_size=7, eos_token_id=1, pad_token_id=0)).save_pretrained("base")
    word_tokenizer(["a", "b", "c", "d"]).save_pretrained("base")
    fit(
        {
            "model.init_args.policy.init_args": {"pretrained": "./base"},
            "model.init_args.critic": None,
            "model.init_args.advantage": {"class_path": "sppo_lightning.advantages.BatchMeanAdvantage"},
        }
    )
    arguments = ("--ckpt=kept/last.ckpt", "--to=out")
    shutil.move("base", "elsewhere")
    assert refused(*arguments) == (
        "`model.policy.pretrained`='./base' does not exist; give the folder of a Hugging Face model (a warm start "
        "writes one) or a hub id such as Qwen/Qwen2.5-1.5B."
    )
    larger = Qwen2Config(**TINY | {"hidden_size": 16}, vocab_size=7, eos_token_id=1, pad_token_id=0)
    Qwen2ForCausalLM(larger).save_pretrained("base")
    word_tokenizer(["a", "b", "c", "d"]).save_pretrained("base")
    assert refused(*arguments) == (
        "`--ckpt`=kept/last.ckpt does not hold the weights of the `policy` that its config describes; the folder of "
        "`model.policy.pretrained` or `config` may have become another model since."
    )
    assert not Path("out").exists()
    shutil.rmtree("base")
    shutil.move("elsewhere", "base")
    main(["export", *arguments])
    assert not Path("out/critic").exists()


class Runs:
    """Runs code when it is loaded."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch hacked",))


def test_a_checkpoint_that_would_run_code(refused: Callable[..., str]):
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {}, "callbacks": Runs()}, "hostile.ckpt")
    assert refused("--ckpt=hostile.ckpt", "--to=out") == (
        "`--ckpt`=hostile.ckpt holds objects beside numbers and text, which may run code when they are loaded; save "
        "one without the callback or component that they belong to."
    )
    assert not Path("hacked").exists()
    torch.load("hostile.ckpt", weights_only=False)
    assert Path("hacked").exists()


def test_a_checkpoint_whose_model_would_run_code(refused: Callable[..., str]):
    fit()
    checkpoint = torch.load("kept/last.ckpt", weights_only=True)
    checkpoint["config"] = checkpoint["config"].replace("trust_remote_code: false", "trust_remote_code: true")
    torch.save(checkpoint, "trusting.ckpt")
    assert refused("--ckpt=trusting.ckpt", "--to=out") == (
        "`model.policy.trust_remote_code`=True in the checkpoint's config lets code run that comes with the model; "
        "set `--trust_remote_code=true` if you trust it."
    )
    main(["export", "--ckpt=trusting.ckpt", "--to=out", "--trust_remote_code=true"])


@pytest.mark.slow
def test_a_sharded_checkpoint_after_the_command_that_the_refusal_names(refused: Callable[..., str]):
    fit()
    checkpoint = torch.load("kept/last.ckpt", weights_only=True)
    dcp.save({"state_dict": checkpoint.pop("state_dict")}, checkpoint_id="sharded", no_dist=True)
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, "sharded/meta.pt")
    [*_, module, folder] = refused("--ckpt=sharded", "--to=out").rstrip(".").split()
    subprocess.run([sys.executable, "-m", module, folder], check=True, capture_output=True)
    main(["export", "--ckpt=sharded.consolidated", "--to=out"])
    main(["export", "--ckpt=kept/last.ckpt", "--to=expected"])
    assert contents("out") == contents("expected")


class Foreign(LightningModule):
    """Has no policy."""


REFUSED = {
    "none": "`--ckpt`=none does not exist; check its path.",
    "kept": "`--ckpt`=kept is a folder, not a checkpoint; the newest in it is kept/last.ckpt.",
    "text.ckpt": "`--ckpt`=text.ckpt is not a checkpoint of a run; give a file that ModelCheckpoint wrote.",
    "sharded": "`--ckpt`=sharded is torn (its .metadata is missing); there is no whole one beside it.",
    "python.ckpt": "`--ckpt`=python.ckpt holds no config, as none of a run from Python does; add `--config`.",
    "foreign.ckpt": "The model of `--ckpt` is a Foreign, which has no policy to export.",
    "gone.ckpt": "The config of `--ckpt` makes no model: `class_path`=my_modules.Mine (in `model`) does not exist; check its module and name.",
    "empty.ckpt": "The config of `--ckpt` makes no model: there is no `model` in it.",
}


@pytest.mark.parametrize("path", REFUSED)
def test_a_checkpoint_that_cannot_be_exported(refused: Callable[..., str], path: str):
    Path("kept").mkdir()
    Path("sharded").mkdir()
    for name in ("kept/last.ckpt", "text.ckpt", "sharded/meta.pt"):
        Path(name).write_text("text")
    run = {"pytorch-lightning_version": "2.6", "state_dict": {}, "global_step": 1}
    torch.save(run, "python.ckpt")
    for name, class_path in (("foreign", f"{__name__}.Foreign"), ("gone", "my_modules.Mine")):
        torch.save({**run, "config": json.dumps({"model": {"class_path": class_path}})}, f"{name}.ckpt")
    torch.save({**run, "config": "data: 1"}, "empty.ckpt")
    assert refused(f"--ckpt={path}", "--to=out") == REFUSED[path]
    assert not Path("out").exists()


def test_a_folder_that_is_taken(refused: Callable[..., str]):
    fit()
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert refused("--ckpt=kept/last.ckpt", "--to=out") == (
        "`--to`=out is not an empty folder; give a new one, or set `--overwrite=true`."
    )
    assert os.listdir("out") == ["notes.txt"]
    assert refused("--ckpt=kept/last.ckpt", "--to=out/notes.txt").startswith(
        "`--to`=out/notes.txt cannot be written ([Errno 17] File exists"
    )
    main(["export", "--ckpt=kept/last.ckpt", "--to=out", "--overwrite=true"])
    assert Path("out/notes.txt").read_text() == "mine"
    assert Path("out/model.safetensors").is_file()


def test_a_run_from_python_needs_its_config():
    fit()
    main(["export", "--ckpt=kept/last.ckpt", "--to=expected"])
    checkpoint = torch.load("kept/last.ckpt", weights_only=True)
    del checkpoint["config"]
    torch.save(checkpoint, "python.ckpt")
    main(["export", "--ckpt=python.ckpt", "--to=out", "--config=config.yaml"])
    assert contents("out") == contents("expected")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "`ckpt` and `to` are not set; see --help for what there is."),
        (("--ckpt=a", "--to=b", "--adapters=merge"), "`adapters`=merge must be one of both, merged, alone; the nearest is merged."),
        (("--ckpt=a", "--to=b", "--adaptors=both"), "`--adaptors` is not an argument of export; the nearest is `--adapters`."),
        (("--ckpt=a", "--to=b", "--config=none.yaml"), "`--config`=none.yaml does not exist; check its path."),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(refused: Callable[..., str], arguments: tuple[str, ...], said: str):
    assert refused(*arguments) == said


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = capsys.readouterr().out
    for words in (
        "a file that ModelCheckpoint wrote",
        "subfolder `critic`",
        "for peft",
        "that is not empty",
        "Run Python code",
    ):
        assert words in said


class KeyedLogger(CSVLogger):
    """Takes what loggers of services take."""

    def __init__(self, save_dir: str, api_key: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(save_dir)
        self.given = (api_key, headers)
        KeyedLogger.last = self.given


def test_secrets_are_in_no_file_and_no_message(capsys: pytest.CaptureFixture[str]):
    secret = "hunter2-is-my-key"
    keyed = {
        "class_path": f"{__name__}.KeyedLogger",
        "init_args": {
            "save_dir": "logs",
            "api_key": secret,
            "headers": {"Authorization": f"Bearer {secret}", "team": "us"},
        },
    }
    fit({"trainer.logger": [keyed]}, WHOLE)
    assert KeyedLogger.last == (secret, {"Authorization": f"Bearer {secret}", "team": "us"})
    Path("config.yaml").unlink()
    main(["export", "--ckpt=kept/last.ckpt", "--to=out"])
    assert [name for name, data in contents(".").items() if secret.encode() in data] == []
    saved = Path("logs/lightning_logs/version_0/config.yaml").read_text()
    assert saved == torch.load("kept/last.ckpt", weights_only=True)["config"]
    assert "api_key: '***'" in saved
    assert "Authorization: '***'" in saved
    assert "team: us" in saved
    keyed["init_args"]["api_key"] = [secret]  # not text
    write_files({"trainer.logger": [keyed]})
    with pytest.raises(SystemExit):
        main(["fit", "--config", "config.yaml"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", "config.yaml", "--trainer.logger=null", "--print_config"])
    said = capsys.readouterr()
    assert secret not in said.err + said.out


def test_what_the_run_came_to_goes_on_in_a_resumed_run():
    fit({"trainer.enable_progress_bar": False})
    first = torch.load("kept/last.ckpt", weights_only=True)["record"]
    assert (first["updates"], first["samples"], first["datasets"]) == (2, 8, [])
    assert first["sampling"]["max_new_tokens"] == 2
    assert set(first["validation"]) >= {"val/held_out/avg@4", "val/held_out/critic_brier"}
    fit({"trainer.max_epochs": 3, "trainer.limit_val_batches": 0}, arguments=("--ckpt_path=kept/last.ckpt",))
    second = torch.load("kept/last.ckpt", weights_only=True)["record"]
    assert (second["updates"], second["samples"]) == (3, 12)
    assert second["validation"] == first["validation"]


def test_the_config_of_a_checkpoint_without_optimizer_states_is_there_too():
    small = {**KEEPER, "init_args": {**KEEPER["init_args"], "dirpath": "small", "save_weights_only": True}}
    fit({"trainer.callbacks": [ROLLOUT, EXACT, small]})
    assert "optimizer_states" not in torch.load("small/last.ckpt", weights_only=True)
    main(["export", "--ckpt=small/last.ckpt", "--to=out"])
    assert Path("out/model.safetensors").is_file()
