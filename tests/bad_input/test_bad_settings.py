from collections.abc import Callable

import pytest
from tiny_config import EXACT, ROLLOUT

MODEL, DATA = "model.init_args.", "data.init_args."


def test_the_same_without_a_mistake_runs(fit: Callable[..., None], capsys: pytest.CaptureFixture[str]):
    fit()
    assert "error: " not in capsys.readouterr().err


OF_THE_SETTINGS = {
    "no rollouts": (
        {"trainer.callbacks": [EXACT]},
        "`trainer.callbacks` has no stage that provides the rollouts that ExactMatch needs; add "
        "sppo_lightning.callbacks.RolloutGeneration to it above ExactMatch.",
    ),
    "no verifier": (
        {"trainer.callbacks": [ROLLOUT]},
        "`trainer.callbacks` has no stage that provides the scores that the module needs; add a verifier such as "
        "sppo_lightning.callbacks.MathVerifier to it.",
    ),
    "wrong order": (
        {"trainer.callbacks": [EXACT, ROLLOUT]},
        "`trainer.callbacks` lists ExactMatch before RolloutGeneration, which provides the rollouts that it needs; move "
        "RolloutGeneration above ExactMatch.",
    ),
    "mini-batch size": (
        {MODEL + "mini_batch_size": 3},
        "`mini_batch_size`=3 does not divide the 4 sequences of an iteration; use 2 or 4.",
    ),
    "gradient clip": (
        {"trainer.gradient_clip_val": 1.0},
        "`trainer.gradient_clip_val`=1.0 does not apply here; remove it and set `max_grad_norm` of "
        "`model.policy_optimizer` and `model.critic_optimizer` instead.",
    ),
    "accumulation": (
        {"trainer.accumulate_grad_batches": 2},
        "`trainer.accumulate_grad_batches`=2 does not apply here; remove it and set `micro_batch_tokens` on `model` instead.",
    ),
    "class path": (
        {"trainer.callbacks": [ROLLOUT, {"class_path": "sppo_lightning.callbacks.ExactMatches"}]},
        "`class_path`=sppo_lightning.callbacks.ExactMatches (in `trainer.callbacks`) does not exist; the nearest is "
        "sppo_lightning.callbacks.ExactMatch.",
    ),
    "key": (
        {DATA + "batch_sise": 4},
        "`batch_sise` is not a setting of sppo_lightning.data.PromptDataModule (in `data`); the nearest is `batch_size`.",
    ),
}


@pytest.mark.parametrize("case", OF_THE_SETTINGS)
def test_settings(refused: Callable[..., str], case: str):
    changes, sentence = OF_THE_SETTINGS[case]
    assert refused(changes) == sentence
