"""The stage that samples further responses where the critic is unsure, within a budget of tokens."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from sppo_lightning.batch import PromptBatch, Rollouts
from sppo_lightning.callbacks.rollout_generation import RolloutGeneration
from sppo_lightning.engines.sampling import request_seed, run_seed
from sppo_lightning.errors import InputError
from sppo_lightning.module import SPPOModule
from sppo_lightning.pipeline import ResamplingStage
from sppo_lightning.pooling import PooledAdvantage
from sppo_lightning.ranks import gather_objects
from sppo_lightning.uncertainty import Belief, CriticVariance, Uncertainty, allocate

_DIGITS = 4  # of V: with fewer or more ranks, further ones are others
_LENGTHS_DECAY = 0.9  # what is left of the lengths of extra responses after an iteration with some


class AdaptiveSamples(ResamplingStage):
    """Samples one response per prompt where the pass rate is known well, and more where it is not.

    An iteration generates about `budget_tokens` tokens over all ranks. The first response to each prompt is never
    left out, and is counted as it is; what remains of the budget is divided by the expected length of an extra
    response, the running mean of theirs, and so many are sampled, each where it is expected to lower the variance
    of the baseline most. So the budget holds on average: in one iteration they may be longer than expected.

    No prompt is chosen by the reward or the length of its own response, of which only the sum over all prompts
    counts: a baseline that knows of the response biases the gradient. `PooledAdvantage` makes a baseline of all
    responses. A prompt with n of them counts n times in the losses of policy and critic, whose target stays R.
    While the critic warms up there are no extra responses.

    Logs, over all ranks, `adaptive/extra_samples`, `adaptive/samples_per_prompt`, `adaptive/tokens` (generated in
    the iteration), `adaptive/budget_fraction` (of the budget), and `adaptive/uncertainty_before` and `_after`: the
    mean variance of the pass rates, as the baseline knows them without the extra responses and with them.

    List it right after the verifiers, since a callback before it that is no stage sees the first responses alone.

    Args:
        budget_tokens: Response tokens of an iteration, over all ranks.
        max_samples: Most responses to a prompt.
        uncertainty: What is believed of the prompts' pass rates; CriticVariance where left out.
    """

    rewinds = True  # what it learns, it learns after the updates

    def __init__(self, budget_tokens: int, max_samples: int = 8, uncertainty: Uncertainty | None = None) -> None:
        super().__init__()
        if budget_tokens < 1:
            raise InputError(
                f"`AdaptiveSamples.budget_tokens`={budget_tokens} is no number of tokens; use the prompts of an "
                "iteration times what you expect a response to be long, or more."
            )
        if max_samples < 2:
            raise InputError(
                f"`AdaptiveSamples.max_samples`={max_samples} leaves no extra response; use 2 or more, or leave "
                "AdaptiveSamples out of `trainer.callbacks`."
            )
        self.budget_tokens = budget_tokens
        self.max_samples = max_samples
        self.uncertainty = uncertainty or CriticVariance()
        self._lengths = (0.0, 0.0)  # running sums of the extra responses' tokens, and of their number
        self._extra = (0, 0)  # the same of this iteration
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, to fit, that there is a V to go by, one response to begin with, and a baseline of several."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if getattr(getattr(pl_module, "critic", None), "reads", None) != "prompt":
            raise InputError(
                "`trainer.callbacks` lists AdaptiveSamples, which goes by a critic that reads prompts, but there "
                "is none; use sppo_lightning.models.PromptCritic, or remove AdaptiveSamples."
            )
        advantage = getattr(pl_module, "advantage", None)
        if not isinstance(advantage, PooledAdvantage):
            raise InputError(
                f"`model.advantage`={type(advantage).__name__} makes nothing of the extra responses that "
                "AdaptiveSamples adds to a prompt; use sppo_lightning.pooling.PooledAdvantage."
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for earlier in callbacks[: callbacks.index(self)]:
            if not isinstance(earlier, RolloutGeneration):
                continue
            if (samples := earlier.sampling.samples_per_prompt) > 1:
                raise InputError(
                    f"`RolloutGeneration.sampling.samples_per_prompt`={samples} gives every prompt so many "
                    "responses before AdaptiveSamples chooses where they are worth it; use 1."
                )
            if earlier.greedy:
                raise InputError(
                    "`RolloutGeneration.greedy`=true would sample a greedy response beside each extra one of "
                    "AdaptiveSamples; use false."
                )

    def begin(self) -> None:
        """Count the extra responses of a new batch."""
        self._extra = (0, 0)

    def process(self, batch: PromptBatch, trainer: Trainer, module: LightningModule) -> None:
        """Add the extra responses behind those of the batch."""
        if not trainer.training:
            return
        assert isinstance(module, SPPOModule)
        assert batch.rollouts is not None
        batch.extra_responses = 0  # a batch may be used again
        own = self._beliefs(batch, trainer, module)
        parts = gather_objects((own, _tokens(batch.rollouts)))
        # in an order that does not depend on the ranks, and that prefers no prompt for its place in the data
        rows = sorted((row for found, _ in parts for row in found), key=itemgetter(0))
        keys, beliefs = [key for key, _ in rows], [belief for _, belief in rows]
        tokens = sum(count for _, count in parts)
        room = self._room(tokens, len(rows)) if "policy" in module.moving_modules() else 0
        counts = allocate(beliefs, room, self.max_samples - 1)
        extra = dict(zip(keys, counts, strict=True))
        if any(counts):
            self._add(batch, [extra[key] for key, _ in own], trainer, module)
        tokens += self._extra[0]
        after = [belief.variance(count) for belief, count in zip(beliefs, counts, strict=True)]
        metrics = {
            "adaptive/extra_samples": float(sum(counts)),
            "adaptive/samples_per_prompt": 1.0 + sum(counts) / len(rows),
            "adaptive/tokens": float(tokens),
            "adaptive/budget_fraction": tokens / self.budget_tokens,
            "adaptive/uncertainty_before": sum(belief.variance() for belief in beliefs) / len(rows),
            "adaptive/uncertainty_after": sum(after) / len(rows),
        }
        module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def _beliefs(self, batch: PromptBatch, trainer: Trainer, module: SPPOModule) -> list[tuple[int, Belief]]:
        """What is believed of each of the batch's prompts, with a number that the prompt alone decides."""
        assert isinstance(module.advantage, PooledAdvantage)
        with trainer.precision_plugin.forward_context():
            batch.value_logits = module.value_logits(batch)  # where it was not asked for while sampling
            values = module.critic_objective.predict(batch.value_logits).double().nan_to_num(0.5)
        rounded = [round(value, _DIGITS) for value in values.tolist()]
        found = self.uncertainty.beliefs(batch.prompts, rounded, module.advantage.prior_strength)
        keys = [request_seed(run_seed(), *batch.noise_key(i, 0)) for i in range(len(batch))]
        return list(zip(keys, found, strict=True))

    def _add(self, batch: PromptBatch, counts: list[int], trainer: Trainer, module: LightningModule) -> None:
        """Sample so many more responses to each prompt of this rank; every rank must, if none."""
        index = [i for i, count in enumerate(counts) for _ in range(count)]
        more = batch.rows(index)
        more.first_samples = [1 + sample for count in counts for sample in range(count)]
        self.sample(more, trainer, module)
        assert batch.rollouts is not None
        assert more.rollouts is not None
        found = gather_objects((_tokens(more.rollouts), len(more)))
        self._extra = (sum(tokens for tokens, _ in found), sum(responses for _, responses in found))
        if index:
            prompts = batch.rollouts.prompt_index.tolist() + [index[i] for i in more.rollouts.prompt_index.tolist()]
            batch.rollouts = Rollouts.concat([batch.rollouts, more.rollouts], prompts)
            batch.extra_responses = len(index)

    def _room(self, first_tokens: int, first_responses: int) -> int:
        """How many extra responses the budget is expected to hold beside the first ones; below 0 for none."""
        if first_tokens > self.budget_tokens and not self._warned:
            rank_zero_warn(
                f"`AdaptiveSamples.budget_tokens`={self.budget_tokens} is less than the {first_tokens} tokens of "
                "one response per prompt, so there is no extra one; raise it, or leave AdaptiveSamples out."
            )
            self._warned = True
        tokens, responses = self._lengths if self._lengths[1] else (first_tokens, first_responses)
        return int((self.budget_tokens - first_tokens) * responses / max(tokens, 1))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Learn how long extra responses are, and what became of all."""
        if self._extra[1]:
            tokens, responses = (
                _LENGTHS_DECAY * old + new for old, new in zip(self._lengths, self._extra, strict=True)
            )
            self._lengths = (tokens, responses)
        self.uncertainty.learn(outputs["experience"])

    def state_dict(self) -> dict[str, Any]:
        """The lengths of extra responses, and what the uncertainty has learned."""
        return {"lengths": self._lengths, "uncertainty": self.uncertainty.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved."""
        tokens, responses = state_dict["lengths"]
        self._lengths = (tokens, responses)
        self.uncertainty.load_state_dict(state_dict["uncertainty"])


def _tokens(rollouts: Rollouts) -> int:
    return int(rollouts.response_mask.sum())
