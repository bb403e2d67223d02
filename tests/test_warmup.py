import logging
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import Recites, TableVerifier, loader, make_batch, make_critic, make_policy, make_trainer

from sppo_lightning import SPPOModule
from sppo_lightning.errors import InputError
from sppo_lightning.optim import GroupOptimizer
from sppo_lightning.warmup import CriticWarmup

GOOD = {"critic/brier_skill": torch.tensor(0.25), "critic/auroc": torch.tensor(0.75)}


def waits(warmup: CriticWarmup, *iterations: tuple[int, dict[str, Any]]) -> list[bool]:
    """Whether the policy is held still in the first iteration, and after each of those given."""
    held = [warmup.running]
    for updates, metrics in iterations:
        warmup.observe(updates, metrics)
        held.append(warmup.running)
    return held


def skill(value: float) -> dict[str, Any]:
    return {"critic/brier_skill": torch.tensor(value)}


def auroc(value: float) -> dict[str, Any]:
    return {"critic/auroc": torch.tensor(value)}


def test_nothing_asked_is_no_wait():
    assert waits(CriticWarmup()) == [False]


def test_a_number_of_updates():
    # two updates per iteration; an iteration is not interrupted
    assert waits(CriticWarmup(updates=5), (2, {}), (4, {}), (6, {}), (8, {})) == [True, True, True, False, False]
    assert waits(CriticWarmup(updates=4), (2, {}), (4, {})) == [True, True, False]


def test_a_skill():
    seen = [(1, skill(-2.0)), (2, skill(0.0625)), (3, skill(0.125)), (4, skill(-1.0))]
    assert waits(CriticWarmup(min_brier_skill=0.125), *seen) == [True, True, True, False, False]  # and stays open
    assert waits(CriticWarmup(min_brier_skill=-3.0), *seen[:1]) == [True, False]


def test_an_auroc():
    seen = [(1, auroc(0.5)), (2, auroc(0.625)), (3, auroc(0.25))]
    assert waits(CriticWarmup(min_auroc=0.625), *seen) == [True, True, False, False]
    assert waits(CriticWarmup(min_auroc=1.0), (1, auroc(0.875)), (2, auroc(1.0))) == [True, True, False]


def test_every_condition_must_hold_at_once():
    warmup = CriticWarmup(updates=2, min_brier_skill=0.125, min_auroc=0.625)
    seen = [
        (1, GOOD),  # too early
        (2, skill(0.25) | auroc(0.5)),
        (3, skill(0.0) | auroc(0.75)),
        (4, GOOD),
    ]
    assert waits(warmup, *seen) == [True, True, True, True, False]


@pytest.mark.parametrize("unknown", [{}, skill(math.nan), auroc(0.875)])
def test_a_skill_that_is_not_known_is_not_reached(unknown: dict[str, Any]):
    # as where all of an iteration's responses have the same reward
    assert waits(CriticWarmup(min_brier_skill=-9.0), (1, unknown), (2, skill(0.0))) == [True, True, False]


def test_the_wait_is_bounded():
    warmup = CriticWarmup(min_brier_skill=0.5, max_updates=3)
    assert waits(warmup, (2, skill(0.0)), (4, skill(0.0))) == [True, True, False]
    assert waits(CriticWarmup(min_auroc=0.75), (199, {}), (200, {})) == [True, True, False]
    assert waits(CriticWarmup(updates=3, min_auroc=0.75, max_updates=3), (2, GOOD), (3, {})) == [True, True, False]
    assert waits(CriticWarmup(min_auroc=0.75, max_updates=0)) == [False]


def test_a_resumed_run_goes_on_where_it_was():
    settings: dict[str, Any] = {"updates": 2, "min_brier_skill": 0.125}
    first = CriticWarmup(**settings)
    assert waits(first, (2, skill(0.0))) == [True, True]
    resumed = CriticWarmup(**settings)
    resumed.load_state_dict(first.state_dict())
    assert waits(resumed, (3, skill(0.25))) == [True, False]
    # and what is over does not begin again, however bad the critic has become
    again = CriticWarmup(**settings)
    again.load_state_dict(resumed.state_dict())
    assert waits(again, (4, skill(-1.0))) == [False, False]


def test_the_end_is_said_once(caplog: pytest.LogCaptureFixture):
    warmup = CriticWarmup(updates=2)
    with caplog.at_level(logging.INFO):
        waits(warmup, (1, GOOD), (2, GOOD), (3, GOOD))
    assert [record.getMessage() for record in caplog.records] == [
        "The critic has warmed up for 2 updates ({'critic/brier_skill': 0.25, 'critic/auroc': 0.75}); the policy "
        "moves from now on."
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"updates": -1},
            "`CriticWarmup.updates`=-1 and `max_updates`=200 leave no wait to make; use 0 or more, and no less for "
            "`max_updates`.",
        ),
        (
            {"updates": 300},
            "`CriticWarmup.updates`=300 and `max_updates`=200 leave no wait to make; use 0 or more, and no less for "
            "`max_updates`.",
        ),
        (
            {"min_brier_skill": 1.0},
            "`CriticWarmup.min_brier_skill`=1.0 is never reached; use less than 1, such as 0.05.",
        ),
        (
            {"min_brier_skill": math.nan},
            "`CriticWarmup.min_brier_skill`=nan is never reached; use less than 1, such as 0.05.",
        ),
        ({"min_auroc": 1.5}, "`CriticWarmup.min_auroc`=1.5 is no share; use 0 to 1, such as 0.6."),
        ({"min_auroc": -0.5}, "`CriticWarmup.min_auroc`=-0.5 is no share; use 0 to 1, such as 0.6."),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], sentence: str):
    with pytest.raises(InputError) as raised:
        CriticWarmup(**settings)
    assert str(raised.value) == sentence


def test_a_run_waits_for_the_skill_that_it_measures():
    class Watches(SPPOModule):
        """Notes, before each iteration, the policy's first weight and whether it is held still."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.seen: list[tuple[float, bool]] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            assert self.critic_warmup is not None
            weight = next(self.policy.parameters()).flatten()[0].item()
            self.seen.append((weight, self.critic_warmup.running))
            super().training_step(batch, batch_idx)

    def moved_in(floor: float) -> list[bool]:
        cases = {"1 + 2 =": ["3 <eos>"], "4 4": ["5 <eos>"], "a b": ["c <eos>"], "d": ["7 <eos>"]}
        right = {(p, r.removesuffix(" <eos>")): float(p in ("1 + 2 =", "d")) for p, [r] in cases.items()}
        quick = GroupOptimizer(lr=0.05, weight_decay=0.0)
        warmup = CriticWarmup(min_brier_skill=floor, max_updates=1000)
        module = Watches(make_policy(), make_critic(zero=True), critic_optimizer=quick, critic_warmup=warmup)
        batches = [make_batch(module.policy, list(cases)) for _ in range(12)]  # type: ignore[arg-type]
        make_trainer(Recites(cases), TableVerifier(right)).fit(module, loader(*batches))
        start = module.seen[0][0]
        assert [held for _, held in module.seen] == sorted((held for _, held in module.seen), reverse=True)
        for (weight, held), (later, _) in pairwise(module.seen):
            assert (later == weight == start) == held  # it stands still as long as it is held, and no longer
        return [held for _, held in module.seen]

    early, late = moved_in(0.1), moved_in(0.9)
    # V = 1/2 has a skill of 0 on two right and two wrong, so nobody may pass in the first iteration
    assert early[:2] == [True, True]
    assert sum(early) < sum(late) < len(late)
