"""Two of the paper's figures in miniature, from runs of the race.

The tail effect (Figure 1): what a token-level critic says, V(s_t), along correct and wrong responses. And V of the
prompt critic against the pass rate of held-out prompts at 64 samples (Figure 7), as a reliability diagram.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chains import chains, pass_rates, sample
from matplotlib.figure import Figure

from sppo_lightning.calibration import critic_metrics, pearson, spearman
from sppo_lightning.figures import calibration_figure, tail_effect_figure
from sppo_lightning.models import CausalLMPolicy, PromptCritic, TokenCritic

BINS = 20  # parts of a response, from its first token to its last


@torch.no_grad()
def tail_effect(run: Path, prompts: int) -> tuple[Figure, dict[str, Any]]:
    """V(s_t) of a finished PPO run's critic along responses of its policy."""
    policy, critic = CausalLMPolicy(str(run / "model")), TokenCritic(str(run / "model" / "critic"))
    policy.build()
    critic.build()
    rollouts, right = sample(policy, chains(policy, prompts), samples=2)
    is_logit = "ppo_bce" in str(run)
    outputs = torch.cat([critic.outputs(rollouts.rows([row])) for row in range(len(rollouts))])
    values = outputs.sigmoid() if is_logit else outputs
    along = np.zeros((len(rollouts), BINS))
    for row, length in enumerate(rollouts.response_mask.sum(1).long().tolist()):
        own = values[row, :length].numpy()
        edges = np.linspace(0, length, BINS + 1)  # in tokens; a part shorter than one has the value of its token
        along[row] = [
            own[int(left) : max(int(np.ceil(right)), int(left) + 1)].mean() for left, right in pairwise(edges)
        ]
    correct, wrong = along[right.numpy()], along[~right.numpy()]
    gap = correct.mean(0) - wrong.mean(0)
    numbers = {"correct": len(correct), "wrong": len(wrong), "gap_start": gap[0], "gap_middle": gap[BINS // 2]}
    numbers |= {"gap_before_the_end": gap[-3], "gap_end": gap[-1]}
    figure = tail_effect_figure(correct, wrong, title="V(s_t) of the token-level critic along a response")
    return figure, numbers


@torch.no_grad()
def foresight(run: Path, prompts: int, samples: int) -> tuple[Figure, dict[str, Any]]:
    """V of a finished SPPO run's critic against the pass rate of its policy."""
    policy, critic = CausalLMPolicy(str(run / "model")), PromptCritic(str(run / "model" / "critic"))
    policy.build()
    critic.build()
    batch = chains(policy, prompts)
    values = critic(batch.prompts).sigmoid()
    rates = pass_rates(policy, batch, samples)
    numbers = {"pearson": pearson(values, rates), "spearman": spearman(values, rates), "prompts": prompts}
    numbers |= {name: float(value) for name, value in critic_metrics(values, rates).items()}
    figure = calibration_figure(values.numpy(), rates.numpy(), title=f"V against Avg@{samples}")
    return figure, numbers


def main() -> None:
    """Draw both figures and write their numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppo", type=Path, required=True, help="folder of a PPO run of the race")
    parser.add_argument("--sppo", type=Path, required=True, help="folder of an SPPO run of the race")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=64, help="responses per prompt for the pass rates")
    parser.add_argument("--figures", type=Path, default=Path("runs/learning"), help="folder of the two figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.figures.mkdir(parents=True, exist_ok=True)
    numbers = {}
    for name, (figure, found) in {
        "tail_effect": tail_effect(arguments.ppo, arguments.prompts),
        "foresight": foresight(arguments.sppo, arguments.prompts, arguments.samples),
    }.items():
        figure.savefig(arguments.figures / f"{name}.png", dpi=110)
        numbers[name] = {key: round(float(value), 4) for key, value in found.items()}
    print(json.dumps(numbers, indent=1))
    print(f"Written: tail_effect.png and foresight.png in {arguments.figures}")


if __name__ == "__main__":
    main()
