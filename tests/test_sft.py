import dataclasses
from typing import Any

import pytest
import torch
from by_hand import CASES, assert_equal
from tiny import loader, make_batch, make_policy, make_trainer
from torch import Tensor

from sppo_lightning import SFTModule
from sppo_lightning.batch import PromptBatch
from sppo_lightning.errors import InputError


def demonstrations(policy: Any) -> PromptBatch:
    batch = make_batch(policy, list(CASES))
    texts = [rows[0][0].replace("<eos>", "").strip() for rows in CASES.values()]
    batch.prompts = [dataclasses.replace(p, demonstration=t) for p, t in zip(batch.prompts, texts, strict=True)]
    return batch


def sft(budget: int) -> tuple[dict[str, Tensor], Any, int]:
    found: list[dict[str, Tensor]] = []
    backwards: list[bool] = []

    class Recording(SFTModule):
        def accumulate(self, loss: Tensor, last: bool) -> None:
            backwards.append(last)
            super().accumulate(loss, last)

        def step_optimizer(self, modules: Any, attempt: Any) -> Any:
            found.append({n: p.grad.clone() for n, p in self.named_parameters()})
            return super().step_optimizer(modules, attempt)

    module = Recording(make_policy(), micro_batch_tokens=budget)
    trainer = make_trainer()
    trainer.fit(module, loader(demonstrations(module.policy)))
    return found[0], trainer, len(backwards)


def test_sft_is_the_mean_cross_entropy_of_the_demonstrations_tokens():
    policy, losses = make_policy(), []
    for prompt, rows in CASES.items():
        ids = policy.tokenizer(prompt)["input_ids"]
        response = policy.tokenizer(rows[0][0].replace("<eos>", ""))["input_ids"] + [policy.tokenizer.eos_token_id]
        logits = policy.model(input_ids=torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    expected = {f"policy.{n}": p.grad for n, p in policy.named_parameters()}
    for budget, count in ((10_000, 1), (45, 3), (1, 8)):
        gradients, trainer, backwards = sft(budget)
        assert backwards == count
        assert_equal(gradients, expected)
        assert float(trainer.callback_metrics["sft/loss"]) == pytest.approx(loss.item(), abs=1e-5)
        assert trainer.global_step == 1


def test_sft_needs_demonstrations():
    policy = make_policy()
    with pytest.raises(InputError, match="Row 0 of the data set 'sums' has no demonstration to learn from"):
        make_trainer().fit(SFTModule(policy), loader(make_batch(policy, ["1 +"])))
