import torch
from given import outcomes

from sppo_lightning.experience import Experience


def test_experience_masks_what_has_no_verdict():
    rollouts = outcomes([(0, 1.0, 0.0), (1, 0.0, 0.0), (2, 0.5, 0.0)]).rollouts
    made = Experience(
        rollouts, torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.5, -0.5, 0.0]), torch.tensor([True, True, False])
    )
    kept = rollouts.response_mask.clone()
    kept[2] = 0.0
    assert rollouts.response_mask[2].sum() > 0
    assert made.mask.tolist() == kept.tolist()
    picked = made.rows([2, 0])
    assert picked.rewards.tolist() == [0.5, 1.0]
    assert picked.advantages.tolist() == [0.0, 0.5]
    assert picked.verdicts.tolist() == [False, True]
    assert [prompt.row for prompt in picked.rollouts.prompts] == [2, 0]
