import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny_config import EXACT, ROLLOUT

SETTINGS = {
    "accelerator": ("gpus", "`trainer.accelerator`=gpus does not exist; the nearest is gpu."),
    "strategy": ("dpp", "`trainer.strategy`=dpp does not exist; the nearest is ddp."),
    "precision": (
        "bf17",
        "`trainer.precision`=bf17 must be a whole number, one of transformer-engine, transformer-engine-float16, 16-true, "
        "16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, one of 64, 32, 16, bf16 or null; the nearest is bf16.",
    ),
    "devices": (
        0,
        "Lightning refuses this run: `Trainer(devices=0)` value is not a valid input using cpu accelerator.",
    ),
    "max_time": (
        "long",
        "Lightning refuses this run: `Timer(duration='long')` is not a valid duration. Expected a string in the format "
        "DD:HH:MM:SS.",
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_the_trainer(refused: Callable[..., str], setting: str):
    value, sentence = SETTINGS[setting]
    assert refused({f"trainer.{setting}": value}) == sentence


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_a_gpu_where_there_is_none(refused: Callable[..., str], name: str):
    sentence = f"`trainer.accelerator`={name} needs what this machine or its torch lacks; use cpu or auto."
    assert refused({"trainer.accelerator": name}) == sentence


def test_an_abbreviated_argument(refused: Callable[..., str]):
    sentence = "`--trainer.max_epoch` is not an argument of fit; the nearest is `--trainer.max_epochs`."
    assert refused(arguments=("--trainer.max_epoch=3",)) == sentence


@pytest.mark.parametrize("value", [{}, None])
def test_an_empty_block_that_does_not_exist(refused: Callable[..., str], value: Any):
    assert refused({"trianer": value}) == "`trianer` is not a setting of fit; the nearest is `trainer`."
    assert refused({"trainer.calback": value}) == (
        "`trainer.calback` is not a setting of fit; the nearest is `trainer.callbacks`."
    )
    assert refused({"model.init_args.optimiser": value}) == (
        "`optimiser` is not a setting of sppo_lightning.SPPOModule (in `model`); the nearest is `policy_optimizer`."
    )


IS_NONE = (
    "is not a checkpoint of a run; give a file that ModelCheckpoint wrote, or start from a model's weights with "
    "`--model.policy.pretrained`."
)
CHECKPOINTS = {
    "nowhere/last.ckpt": "`--ckpt_path`=nowhere/last.ckpt does not exist; check its path.",
    "kept/lasst.ckpt": "`--ckpt_path`=kept/lasst.ckpt does not exist; the nearest is kept/last.ckpt.",
    "kept": "`--ckpt_path`=kept is a folder, not a checkpoint; the newest in it is kept/last.ckpt.",
    "text.ckpt": f"`--ckpt_path`=text.ckpt {IS_NONE}",
    "weights.ckpt": f"`--ckpt_path`=weights.ckpt {IS_NONE}",
    "objects.ckpt": "`--ckpt_path`=objects.ckpt holds objects beside numbers and text, which may run code when they are loaded; "
    "set `--weights_only=false` if you trust it.",
    "archive.ckpt": f"`--ckpt_path`=archive.ckpt {IS_NONE}",
    "best": 'Lightning refuses this run: `.fit(ckpt_path="best")` is set but `ModelCheckpoint` is not configured.',
}


@pytest.mark.parametrize("path", CHECKPOINTS)
def test_a_checkpoint_that_is_none(refused: Callable[..., str], path: str):
    Path("kept").mkdir()
    for name in ("kept/last.ckpt", "text.ckpt"):
        Path(name).write_text("weights")
    torch.save({"layer.weight": torch.zeros(2)}, "weights.ckpt")
    torch.save({"pytorch-lightning_version": "2.6", "folder": Path()}, "objects.ckpt")
    with zipfile.ZipFile("archive.ckpt", "w") as archive:
        archive.writestr("a.txt", "text")
    assert refused(arguments=(f"--ckpt_path={path}",)) == CHECKPOINTS[path]


class Runs:
    """Runs code when it is loaded."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch hacked",))


@pytest.mark.parametrize("path", ["kept/last.ckpt", "last", "http"])
def test_a_checkpoint_that_would_run_code(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
):
    Path("kept").mkdir()
    torch.save({"pytorch-lightning_version": "2.6", "callbacks": Runs()}, "kept/last.ckpt")
    keeper = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}
    trainer = {"trainer.enable_checkpointing": True, "trainer.callbacks": [ROLLOUT, EXACT, keeper]}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever)
        address = f"http://127.0.0.1:{server.server_port}/kept/last.ckpt" if path == "http" else path
        try:
            said = refused(trainer, arguments=(f"--ckpt_path={address}",))
        finally:
            server.shutdown()
    assert said.endswith("may run code when they are loaded; set `--weights_only=false` if you trust it.")
    assert not Path("hacked").exists()


def test_a_checkpoint_of_a_run_is_resumed(fit: Callable[..., None], caplog: pytest.LogCaptureFixture):
    keeper = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": "kept", "save_last": True},
    }
    trainer = {"trainer.enable_checkpointing": True, "trainer.callbacks": [ROLLOUT, EXACT, keeper]}
    fit(trainer)
    fit({**trainer, "trainer.max_epochs": 2}, arguments=("--ckpt_path=kept/last.ckpt",))
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 2  # one update per epoch
    assert "Restored all states from the checkpoint at kept/last.ckpt" in caplog.messages


class Broken(Callback):
    """Has a bug of its own: a comparison that raises, or a call that Lightning refuses."""

    def __init__(self, misuse: bool) -> None:
        self.misuse = misuse

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.misuse:
            pl_module.log("a", 1.0, reduce_fx="middle")
        raise ValueError("a bug")


@pytest.mark.parametrize("misuse", [True, False])
def test_a_bug_stays_a_traceback(fit: Callable[..., None], misuse: bool):
    broken = {"class_path": f"{__name__}.Broken", "init_args": {"misuse": misuse}}
    with pytest.raises(Exception, match="middle" if misuse else "a bug") as raised:
        fit({"trainer.callbacks": [ROLLOUT, EXACT, broken]})
    assert any(entry.name == "on_train_start" and entry.path == Path(__file__) for entry in raised.traceback)
