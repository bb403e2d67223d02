"""Which components go together; a combination that cannot work is refused before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from sppo_lightning.errors import InputError, check_option
from sppo_lightning.functional import KLEstimator
from sppo_lightning.objectives import BinaryCrossEntropy

KLPlace = Literal["loss", "reward"]  # a term of the loss, or subtracted from the reward
_CRITICS = {
    "prompt": "sppo_lightning.models.PromptCritic, which reads the prompt alone",
    "token": "sppo_lightning.models.TokenCritic, which reads every token",
}


def check_combination(module: Any) -> None:
    """Check advantage, objective, critic and the critic's loss of an `SPPOModule` against each other."""
    if not 0 <= module.kl_coef < math.inf:
        raise InputError(
            f"`kl_coef`={module.kl_coef} is no weight of a penalty; use 0 (none) or more, such as 0.001."
        )
    check_option("kl_estimator", module.kl_estimator, KLEstimator)
    check_option("kl_in", module.kl_in, KLPlace)
    advantage, critic = module.advantage, module.critic
    name = type(advantage).__name__
    if advantage.critic is None and critic is not None:
        raise InputError(
            f"`advantage`={name} uses no critic, but `model.critic` is {type(critic).__name__}; set it to null."
        )
    if advantage.critic is not None and (critic is None or critic.reads != advantage.critic):
        has = "needs a critic" if critic is None else f"cannot use `model.critic`={type(critic).__name__}"
        raise InputError(f"`advantage`={name} {has}; set `model.critic` to {_CRITICS[advantage.critic]}.")
    loss = module.critic_objective
    if critic is not None and critic.reads not in loss.critics:
        raise InputError(
            f"`critic_objective`={type(loss).__name__} cannot train {type(critic).__name__}, whose V is a "
            "chance; use sppo_lightning.objectives.BinaryCrossEntropy."
        )
    if advantage.token_level and not module.objective.takes_token_advantages:
        raise InputError(
            f"`objective`={type(module.objective).__name__} takes one advantage per response, and "
            f"`advantage`={name} gives one per token; use sppo_lightning.objectives.TokenClipObjective."
        )
    if module.critic_replay is not None and (critic is None or critic.reads != "prompt"):
        raise InputError(
            "`critic_replay` is set, and replays prompts, which "
            f"`model.critic`={'null' if critic is None else type(critic).__name__} does not learn from alone; "
            f"remove it, or set `model.critic` to {_CRITICS['prompt']}."
        )
    if module.critic_replay is not None and not isinstance(loss, BinaryCrossEntropy):
        raise InputError(
            f"`critic_objective`={type(loss).__name__} and `critic_replay` would train the critic by two losses: "
            "what is replayed counts by binary cross-entropy. Remove one of them."
        )
    if module.critic_warmup is not None and critic is None:
        raise InputError("`critic_warmup` is set, but there is no `model.critic` to warm up; remove it.")


def check_sampling(module: Any, callbacks: Iterable[Any]) -> None:
    """Check what `RolloutGeneration` samples against what the module makes of it."""
    for callback in callbacks:
        sampling = getattr(callback, "sampling", None)
        if sampling is None:
            continue
        name, samples = type(module.advantage).__name__, sampling.samples_per_prompt
        if samples < module.advantage.min_samples:
            raise InputError(
                f"`advantage`={name} compares the responses to one prompt, and `samples_per_prompt`={samples} of "
                f"RolloutGeneration's `sampling` gives it {samples}; use {module.advantage.min_samples} or more, "
                "such as 8."
            )
        if module.advantage.needs_greedy and not callback.greedy:
            raise InputError(
                f"`advantage`={name} needs a greedy response per prompt; set `greedy: true` on RolloutGeneration."
            )
        truncated = sampling.truncates
        sample_from = getattr(callback, "sample_from", "policy")
        if module.kl_coef and module.kl_in == "reward" and (truncated or sample_from != "policy"):
            raise InputError(
                f"`kl_in`=reward compares the policy that samples with the reference, and RolloutGeneration's "
                f"`sample_from`={sample_from}, {_cuts(sampling)} sample from "
                "something else; sample from the whole policy, or use `kl_in: loss`."
            )
        weighted = module.objective.is_importance_weighted
        from_sampler = not module.recompute_old_log_probs or sample_from != "policy"
        if truncated and (from_sampler or weighted):
            other = "with another objective, sample" if weighted else "sample"
            raise InputError(
                f"{_cuts(sampling)} of RolloutGeneration's `sampling` cut "
                "tokens off: the sampler's log-probabilities are not the policy's, and their ratio is biased; "
                f"use top_p 1, top_k 0, min_p 0, or {other} from the policy with `recompute_old_log_probs: true`."
            )


def _cuts(sampling: Any) -> str:
    return f"`top_p`={sampling.top_p}, `top_k`={sampling.top_k} and `min_p`={sampling.min_p}"
