"""The mathematics: pure functions of tensors, none of which changes its inputs.

`N` sequences of `T` response tokens, right-padded; `mask` `[N, T]` is 1.0 on response tokens, the
end-of-sequence token included. What stands at other positions, NaN included, reaches no loss and no gradient.
`rewards`, `groups` and `advantages` are `[N]`, log-probabilities `[N, T]` in nats. float32 in, float32 out;
float64 in, float64 out. An unknown option is a `ValueError` that names those there are.

The `stats` of the objectives are detached scalars, each a mean over response tokens: weighted by the tokens
of each micro-batch, they average to those of the mini-batch.
"""

from sppo_lightning.functional.advantages import (
    blend_advantages,
    gae,
    greedy_baseline_advantage,
    group_advantage,
    last_token_rewards,
    leave_one_out_advantage,
    pooled_advantage,
    sequence_advantage,
    whiten_tokens,
)
from sppo_lightning.functional.importance import truncated_importance_weights
from sppo_lightning.functional.losses import (
    Aggregation,
    KLEstimator,
    aggregate,
    clipped_value_loss,
    critic_loss,
    kl_penalty,
)
from sppo_lightning.functional.masking import token_mean
from sppo_lightning.functional.objectives import (
    RatioLevel,
    RatioNormalization,
    importance_weighted_objective,
    sequence_clip_objective,
    token_clip_objective,
)

__all__ = [
    "Aggregation",
    "KLEstimator",
    "RatioLevel",
    "RatioNormalization",
    "aggregate",
    "blend_advantages",
    "clipped_value_loss",
    "critic_loss",
    "gae",
    "greedy_baseline_advantage",
    "group_advantage",
    "importance_weighted_objective",
    "kl_penalty",
    "last_token_rewards",
    "leave_one_out_advantage",
    "pooled_advantage",
    "sequence_advantage",
    "sequence_clip_objective",
    "token_clip_objective",
    "token_mean",
    "truncated_importance_weights",
    "whiten_tokens",
]
