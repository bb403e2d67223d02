"""Outcomes with given rewards and values, for what is computed outside a run."""

import torch
from tiny import make_policy

from sppo_lightning.batch import Prompt, PromptBatch
from sppo_lightning.engines.packing import pack_rollouts
from sppo_lightning.experience import Outcomes


def outcomes(rows: list[tuple[int, float | None, float]], dataset: str = "sums") -> Outcomes:
    """Of (row of the data set, reward or None, value logit); each prompt reads as its row, each response has a token."""
    policy, many = make_policy(), range(len(rows))
    prompts = [
        Prompt(str(row), "5", dataset, row, messages=({"role": "user", "content": str(row)},)) for row, _, _ in rows
    ]
    batch = PromptBatch(prompts, [[5 + row] for row, _, _ in rows], [0] * len(rows))
    rollouts = pack_rollouts(
        batch,
        [*many],
        [[4] for _ in many],
        [[-1.0] for _ in many],
        ["stop" for _ in many],
        policy=policy,
        temperature=1.0,
        versions=[0 for _ in many],
    )
    return Outcomes(
        rollouts,
        rewards=torch.tensor([reward or 0.0 for _, reward, _ in rows], dtype=torch.float64),
        verdicts=torch.tensor([reward is not None for _, reward, _ in rows]),
        value_logits=torch.tensor([logit for _, _, logit in rows], dtype=torch.float64),
    )
