"""Real components at the smallest size: models of one layer, a pipeline whose responses and scores are given."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from sppo_lightning import SPPOModule
from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.callbacks import Verifier
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.models import CausalLMPolicy, LoRA, PromptCritic, TinyPolicy, TokenCritic
from sppo_lightning.models.tiny import word_tokenizer
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.pipeline import Stage

WORDS = "0 1 2 3 4 5 6 7 8 9 + - = ; a b c d e f g h i j k l m n o p q r s t u"  # 38 ids with the special ones
CHAIN_WORDS = r"0 1 2 3 4 5 6 7 8 9 +1 +2 +3 = ; \boxed{ } a b c d e f g h i j k l m n o p q r s t"  # of ChainTask
CRITIC_CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}

# what sets a family's logits or attention apart, beside the usual sizes
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},  # learned positions
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.25},
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
    },  # its base has another name
    "bert": {"is_decoder": True},  # layers of its own between the transformer and the output embedding
}


def family_config(family: str, vocab_size: int) -> dict[str, Any]:
    """A model of two layers of width 16; the ids of special tokens are those of `word_tokenizer`."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
    }
    special = {"vocab_size": vocab_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return {"model_type": family, **({} if family == "gpt2" else sizes), **special, **FAMILIES.get(family, {})}


class FamilyPolicy(CausalLMPolicy):
    """A model of a given family with random weights, sharp enough that its choices differ."""

    def __init__(self, family: str, config: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(config=family_config(family, len(self.tokenizer)) | dict(config or {}), **settings)
        torch.manual_seed(3)
        self.build()
        for parameter in self.parameters():
            parameter.data.mul_(5.0 if parameter.ndim > 1 else 1.0)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer(WORDS.split())


class TinyCritic(PromptCritic):
    """A critic with a vocabulary of its own, and a value head that is drawn at random unless `zero`."""

    def __init__(self, zero: bool = False, words: str = " ".join(reversed(WORDS.split())), **settings: Any) -> None:
        super().__init__(config=CRITIC_CONFIG | settings.pop("config", {}), **settings)
        self.zero = zero
        self.words = words

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer(self.words.split())

    def build(self) -> None:
        fresh = self.model is None
        super().build()
        if fresh and not self.zero:
            torch.nn.init.normal_(self.value_head.weight)


def make_policy(seed: int = 0, **settings: Any) -> TinyPolicy:
    """A policy of two layers, sharp enough that responses differ."""
    torch.manual_seed(seed)
    policy = TinyPolicy(
        WORDS, **{"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32} | settings
    )
    policy.build()
    for parameter in policy.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return policy


def response_log_probs(
    policy: TinyPolicy, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """`[T]`, from the model's own logits: one row, without padding, with a gradient."""
    logits = policy.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(response)), list(response)]


class TinyTokenCritic(TokenCritic):
    """A critic that reads the policy's tokens, with a value head that is drawn at random."""

    def __init__(self) -> None:
        super().__init__(config=CRITIC_CONFIG)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return word_tokenizer(WORDS.split())

    def build(self) -> None:
        fresh = self.model is None
        super().build()
        if fresh:
            torch.nn.init.normal_(self.value_head.weight)


def make_token_critic(seed: int = 1) -> TinyTokenCritic:
    torch.manual_seed(seed)
    critic = TinyTokenCritic()
    critic.build()
    return critic


def make_critic(seed: int = 1, **settings: Any) -> TinyCritic:
    torch.manual_seed(seed)
    critic = TinyCritic(**settings)
    critic.build()
    return critic


def make_chain_policy(lora: LoRA | None = None) -> TinyPolicy:
    """A policy of one layer for the chain task, not yet built."""
    return TinyPolicy(CHAIN_WORDS, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, lora=lora)


def make_chain_sppo(learning_rate: float, lora: LoRA | None = None, **settings: Any) -> SPPOModule:
    """SPPO on the chain task, in mini-batches of 4."""
    rate = GroupOptimizer(lr=learning_rate)
    chosen: dict[str, Any] = {"policy_optimizer": rate, "critic_optimizer": rate, "mini_batch_size": 4} | settings
    if "critic" not in chosen:
        chosen["critic"] = make_critic(words=CHAIN_WORDS, lora=lora)
    return SPPOModule(make_chain_policy(lora), **chosen)


def make_batch(policy: TinyPolicy, texts: Sequence[str], gold: str = "5", first_row: int = 0) -> PromptBatch:
    return PromptBatch(
        prompts=[Prompt(text, gold, "sums", first_row + i) for i, text in enumerate(texts)],
        token_ids=[policy.tokenizer(text)["input_ids"] for text in texts],
        visits=[0] * len(texts),
    )


def loader(*batches: PromptBatch) -> DataLoader[PromptBatch]:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


class Recites(Stage):
    """Gives each prompt its responses from a table; sampled log-probabilities are all −1."""

    provides = frozenset({"rollouts"})

    def __init__(self, responses: Mapping[str, Sequence[str]], temperature: float = 1.0) -> None:
        self.responses = responses
        self.temperature = temperature

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        policy: Any = module.policy
        index = [i for i, prompt in enumerate(batch.prompts) for _ in self.responses[prompt.text]]
        texts = [text for prompt in batch.prompts for text in self.responses[prompt.text]]
        ids = [policy.tokenizer(text)["input_ids"] for text in texts]
        with trainer.precision_plugin.forward_context():
            batch.rollouts = pack_rollouts(
                batch,
                index,
                ids,
                [[-1.0] * len(row) for row in ids],
                ["stop" if text.endswith("<eos>") else "length" for text in texts],
                policy=policy,
                temperature=self.temperature,
                versions=[trainer.global_step] * len(ids),
            )


class TableVerifier(Verifier):
    """Scores a response by a table from (prompt, response) to score."""

    def __init__(self, table: Mapping[tuple[str, str], float | None], **settings: Any) -> None:
        super().__init__(**settings)
        self.table = table

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [self.table[p.text, r] for p, r in zip(prompts, responses, strict=True)]


class AnyDigit(Verifier):
    """Scores the share of digits among a response's words: from random weights, neither all nor none."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        words = [response.split() for response in responses]
        return [sum(word.isdigit() for word in row) / max(len(row), 1) for row in words]


class EvenRows(Verifier):
    """Half of the prompts are solved whatever the response, so that some weights rise and others fall."""

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [float(prompt.row % 2 == 0) for prompt in prompts]


class RecordingSPPO(SPPOModule):
    """Keeps the gradients of every update, as they were before clipping, and counts the backward passes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.backwards = 0

    def accumulate(self, loss: torch.Tensor, last: bool) -> None:
        self.backwards += 1
        super().accumulate(loss, last)

    def step_optimizer(self, modules: Any, attempt: Any) -> Any:
        self.gradients.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})
        return super().step_optimizer(modules, attempt)


class KnowsWhatFollows:
    """A loader whose batches know the next one."""

    def __init__(self, batches: list[PromptBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        for batch, upcoming in zip(self.batches, [*self.batches[1:], None], strict=True):
            batch.draw_upcoming = None if upcoming is None else partial(lambda following: following, upcoming)
            yield batch


def make_trainer(*callbacks: Any, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **defaults | settings)
