from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_config import EXACT, ROLLOUT, TINY
from transformers import Qwen2Config, Qwen2ForSequenceClassification

POLICY, CRITIC = "model.init_args.policy.init_args", "model.init_args.critic.init_args"
SIZES = {**TINY, "vocab_size": 7}
OF_A_MODEL = {
    "no folder": (
        {POLICY: {"pretrained": "./nowhere"}},
        "`model.policy.pretrained`='./nowhere' does not exist; give the folder of a Hugging Face model (a warm start "
        "writes one) or a hub id such as Qwen/Qwen2.5-1.5B.",
    ),
    "adapters alone": (
        {POLICY: {"pretrained": "./adapter", "tokenizer": "./tokenizer"}},
        "`model.policy.pretrained`='./adapter' holds adapters, not a model; give the folder of a whole one, with adapters "
        "merged, as HFExport writes it.",
    ),
    "unknown family": (
        {f"{POLICY}.config": {**SIZES, "model_type": "qwen22"}},
        "`model.policy.config.model_type`='qwen22' cannot be built as AutoModelForCausalLM (Unrecognized model identifier: "
        "qwen22); correct its values or use another family, such as qwen2.",
    ),
    "sizes that do not fit": (
        {f"{POLICY}.config": {**SIZES, "num_attention_heads": 3}},
        "`model.policy.config` makes a Qwen2ForCausalLM that cannot read a few tokens (The size of tensor a (3) must match "
        "the size of tensor b (2) at non-singleton dimension 1); correct its sizes.",
    ),
    "more weights than memory": (
        {f"{POLICY}.config": {**SIZES, "hidden_size": 2**20}},
        "GiB, and this machine has",
    ),
    "small vocabulary": (
        {f"{POLICY}.config.vocab_size": 3},
        "`model.policy.tokenizer`='./tokenizer' has 7 tokens, and the model embeds 3; give the tokenizer that belongs to it.",
    ),
    "small vocabulary with LoRA": (
        {f"{POLICY}.config.vocab_size": 3, f"{POLICY}.lora": {"rank": 2}},
        "`model.policy.tokenizer`='./tokenizer' has 7 tokens, and the model embeds 3; give the tokenizer that belongs to it.",
    ),
    "LoRA of no layer": (
        {f"{POLICY}.lora": {"target_modules": ["q_prj"]}},
        "`model.policy.lora.target_modules`=['q_prj'] cannot be adapted (No modules were targeted for adaptation); name "
        "linear layers of Qwen2ForCausalLM below its head.",
    ),
    "critic with three labels": (
        {CRITIC: {"pretrained": "./three", "tokenizer": "./critic"}},
        "`model.critic.pretrained`='./three' has a head `score.weight` of the shape [3, 8], and a critic needs [1, 8], one "
        "prediction; give a causal language model, such as Qwen/Qwen2.5-0.5B, or an exported critic.",
    ),
    "critic with a narrow head": (
        {CRITIC: {"pretrained": "./narrow", "tokenizer": "./critic"}},
        "`model.critic.pretrained`='./narrow' has a head `score.weight` of the shape [1, 4], and a critic needs [1, 8], one "
        "prediction; give a causal language model, such as Qwen/Qwen2.5-0.5B, or an exported critic.",
    ),
}


def write_models() -> None:
    """Classifiers whose heads are none of a critic, and a folder with adapters alone."""
    sizes = {name: value for name, value in SIZES.items() if name != "model_type"}
    for name, labels, width in (("three", 3, 8), ("narrow", 1, 4)):
        model = Qwen2ForSequenceClassification(Qwen2Config(**sizes, num_labels=labels, pad_token_id=0))
        model.score = torch.nn.Linear(width, labels, bias=False)
        model.save_pretrained(name)
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")


@pytest.mark.parametrize("case", OF_A_MODEL)
def test_models(refused: Callable[..., str], case: str):
    changes, sentence = OF_A_MODEL[case]
    write_models()
    said = refused(changes)
    assert said == sentence or (case == "more weights than memory" and sentence in said)


OF_ANOTHER = {  # what is changed between the checkpoint and the run that is to go on from it
    "width": (
        {f"{POLICY}.config.hidden_size": 16},
        "its `policy.model.model.embed_tokens.weight` has the shape [7, 8], and that of `model.policy` [7, 16]",
    ),
    "layers": (
        {f"{CRITIC}.config": {**TINY, "num_hidden_layers": 2}},
        "it lacks `critic.model.model.layers.1.self_attn.q_proj.weight`, which `model.critic` has",
    ),
    "adapters": (
        {f"{POLICY}.lora": {"rank": 2}},
        "it lacks `policy.model.model.layers.0.self_attn.q_proj.base_layer.weight`, which `model.policy` has",
    ),
    "no reference": (
        {"model.init_args.kl_coef": 0.1},
        "it lacks `reference.model.model.embed_tokens.weight`, which this run's reference has",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.mark.parametrize("case", OF_ANOTHER)
def test_a_checkpoint_of_another_model(
    fit: Callable[..., None], refused: Callable[..., str], checkpoint: Path, case: str
):
    changes, difference = OF_ANOTHER[case]
    keeper: dict[str, Any] = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(checkpoint), "save_last": True},
    }
    trainer = {"trainer.enable_checkpointing": True, "trainer.callbacks": [ROLLOUT, EXACT, keeper]}
    path = checkpoint / "last.ckpt"
    if not path.exists():
        fit(trainer)
    assert refused({**trainer, **changes}, arguments=(f"--ckpt_path={path}",)) == (
        f"`--ckpt_path`={path} is of another model: {difference}; give a checkpoint of this config, or that "
        "checkpoint's config."
    )
