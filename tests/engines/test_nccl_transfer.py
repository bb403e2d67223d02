"""NCCLTransfer with real servers, to which the bytes go through a TCP store where NCCL's would go from GPU to GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import store_transfer
import torch
from contract import ids, sample
from test_docs import callbacks_built, only
from training import check_versions
from vllm_process import VLLMProcess, served_policy

from sppo_lightning.callbacks import RolloutGeneration
from sppo_lightning.engines import FolderTransfer, HFEngine, NCCLTransfer, VLLMServerEngine
from sppo_lightning.errors import InputError

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServerEngine]:
    store_transfer.use_store()
    folder = tmp_path_factory.mktemp("nccl")
    environment = store_transfer.installed_in(folder / "plugin")
    transfer = NCCLTransfer(str(folder / "model"))
    servers = [VLLMProcess(transfer, folder, environment) for _ in range(2)]
    try:
        for server in servers:
            server.wait()
        yield VLLMServerEngine([server.url for server in servers], transfer)
    finally:
        for server in servers:
            server.kill()


def test_no_weight_is_written(engine: VLLMServerEngine):
    assert isinstance(engine.transfer, NCCLTransfer)
    names = {path.name for path in engine.transfer.folder.path.iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert not [name for name in names if "safetensors" in name]


def test_greedy_responses_are_those_of_hf_engine(engine: VLLMServerEngine):
    for seed in (3, 4):  # the second goes through the groups that the first has made
        policy = served_policy(seed)
        rollouts = sample(engine, policy, temperature=0.0)
        assert ids(rollouts) == ids(sample(HFEngine(), policy, temperature=0.0))
        with torch.no_grad():
            torch.testing.assert_close(rollouts.sampled_log_probs, policy(rollouts)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_responses_come_from_the_updated_weights(engine: VLLMServerEngine, prefetch: int):
    check_versions(engine, prefetch, 1e-4)


def test_a_server_that_was_started_for_another_transfer(engine: VLLMServerEngine, tmp_path: Path):
    server = VLLMProcess(FolderTransfer(str(tmp_path / "model")), tmp_path)
    try:
        server.wait()
        with pytest.raises(InputError) as raised:
            sample(VLLMServerEngine([server.url], engine.transfer), served_policy())
    finally:
        server.kill()
    assert str(raised.value).startswith(f"The vLLM server at {server.url} takes no weights over NCCL; start it: ")
    assert str(raised.value).endswith("""--weight-transfer-config '{"backend": "nccl"}'""")


def test_the_documented_settings_build_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    callbacks = callbacks_built("NCCLTransfer", monkeypatch, tmp_path, "docs/vllm.md")
    engine = only(RolloutGeneration, callbacks).engine
    assert engine.urls == ["http://10.0.0.7:8000"]
    assert engine.transfer.address == "10.0.0.2"
