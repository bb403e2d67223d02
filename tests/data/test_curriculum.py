"""What all curricula share, and the one that treats prompts alike."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from curricula import bound, observe

from sppo_lightning.batch import Prompt
from sppo_lightning.data import (
    Curriculum,
    PassRateCurriculum,
    SolvabilityCurriculum,
    StagedCurriculum,
    UniformSampling,
)
from sppo_lightning.data.curriculum import FlooredCurriculum
from sppo_lightning.data.formatting import PromptFormat
from sppo_lightning.data.loader import PromptLoader
from sppo_lightning.errors import InputError

DRAWS = 20_000


class Given(FlooredCurriculum):
    """Prompts of given pass rates and worth."""

    def __init__(self, worth: list[float], floor: float = 0.1, rates: list[float] | None = None) -> None:
        super().__init__(floor)
        self.worth, self.rates = np.array(worth), np.array(rates or worth)

    def pass_rates(self) -> np.ndarray:
        return self.rates

    def weights(self) -> np.ndarray:
        return self.worth


def test_uniform_sampling_is_a_permutation_per_epoch_or_the_files_order():
    shuffled, in_order = bound(UniformSampling(), 7), bound(UniformSampling(), 7, shuffle=False)
    for epoch in (0, 1, 4):
        order = np.random.default_rng([3, epoch]).permutation(7).tolist()
        assert [shuffled.draw(3, epoch, batch) for batch in range(3)] == [order[:3], order[3:6], order[6:]]
        assert [in_order.draw(3, epoch, batch) for batch in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
        assert shuffled.visit(epoch, 2) == epoch
    shuffled.bind(shuffled.prompts, 3, 4, True)
    assert shuffled.draw(7, 4, 0) == np.random.default_rng([4, 4]).permutation(7).tolist()


def test_the_floor_is_shared_by_all_and_the_rest_by_worth():
    curriculum = bound(Given([3.0, 1.0, 0.0], floor=0.3), 3)
    assert curriculum.probabilities() == pytest.approx([0.1 + 0.7 * 3 / 4, 0.1 + 0.7 / 4, 0.1])
    assert bound(Given([0.0] * 4), 4).probabilities() == pytest.approx([0.25] * 4)
    assert bound(Given([5.0, 0.0], floor=1.0), 2).probabilities() == pytest.approx([0.5, 0.5])


def test_draws_are_distinct_and_as_frequent_as_their_probabilities():
    curriculum = bound(Given([3.0, 1.0, 0.0], floor=0.3), 3)
    drawn = Counter(tuple(curriculum.draw(2, 0, batch)) for batch in range(DRAWS))
    p = [0.625, 0.275, 0.1]
    expected = {(i, j): p[i] * p[j] / (1 - p[i]) for i in range(3) for j in range(3) if i != j}
    assert set(drawn) == set(expected)  # all pairs of two different ones
    for pair, chance in expected.items():
        assert drawn[pair] / DRAWS == pytest.approx(chance, abs=4 * (chance * (1 - chance) / DRAWS) ** 0.5), pair


def test_a_draw_depends_on_the_seed_and_its_place_alone():
    first, twin, other = (bound(Given([0.25] * 40), 40, seed=seed) for seed in (1, 1, 2))
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    drawn = [tuple(first.draw(8, *place)) for place in places]
    assert len(set(drawn)) == 4
    assert [tuple(twin.draw(8, *place)) for place in reversed(places)] == drawn[::-1]
    assert tuple(other.draw(8, 0, 0)) not in drawn
    assert len({first.visit(*place) for place in places}) == 4
    assert sorted(first.draw(40, 0, 0)) == list(range(40))


def test_the_distribution_over_pass_rates_is_described():
    curriculum = bound(Given([1.0] * 5, rates=[0.0, 0.1, 0.5, 0.9, 1.0]), 5)
    shares = {"share_0_to_20": 0.5, "share_20_to_40": 0.0, "share_40_to_60": 0.25}
    shares |= {"share_60_to_80": 0.0, "share_80_to_100": 0.25}
    assert curriculum.describe(np.array([0, 1, 2, 4])) == {"expected_pass_rate": pytest.approx(0.4), **shares}
    assert curriculum.describe(np.array([], dtype=np.int64)) == {}


def test_coverage_counts_prompts_with_an_outcome():
    curriculum = bound(UniformSampling(), 8)
    assert curriculum.coverage == 0.0
    observe(curriculum, (1, 1.0), (1, 0.0), (5, 0.0))
    observe(curriculum, (5, 1.0))
    observe(curriculum)  # an iteration without a verdict
    assert curriculum.coverage == 0.25
    assert curriculum.last_seen.tolist() == [-1, 0, -1, -1, -1, 1, -1, -1]
    assert curriculum.iteration == 3


def learned(curriculum: Curriculum) -> Curriculum:
    """Bound to 8 prompts, and told of two iterations and, where it wants them, of values."""
    bound(curriculum, 8)
    for outcomes in ([(0, 1.0), (1, 1.0), (2, 0.0)], [(1, 1.0), (6, 0.5)]):
        observe(curriculum, *outcomes)
        if curriculum.wants_values:
            curriculum.rescore(np.linspace(0, 1, 8) ** curriculum.iteration)
    return curriculum


def each() -> list[Curriculum]:
    return [
        UniformSampling(),
        PassRateCurriculum(half_life_iterations=2.0),
        SolvabilityCurriculum(rescore_every_n_iterations=1),
        StagedCurriculum("place", stages=2, min_iterations=1, threshold=0.5),
    ]


@pytest.mark.parametrize("kind", range(4), ids=[type(one).__name__ for one in each()])
def test_a_copy_with_the_state_goes_on_as_the_original(kind: int, tmp_path: Path):
    original, copy = learned(each()[kind]), bound(each()[kind], 8)
    torch.save(original.state_dict(), tmp_path / "state.pt")
    copy.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    everything = np.arange(8)
    for _ in range(2):
        assert copy.draw(3, 1, 0) == original.draw(3, 1, 0)
        assert copy.describe(everything) == original.describe(everything)
        assert copy.coverage == original.coverage
        for curriculum in (original, copy):
            observe(curriculum, (3, 1.0), (7, 0.0))
    fresh = bound(each()[kind], 8)
    assert fresh.coverage != original.coverage
    kept = original.state_dict()
    observe(original, (4, 1.0))
    assert kept["last_seen"].tolist()[4] == -1  # a state is a copy


def test_other_data_and_another_curriculum_start_anew():
    state = learned(PassRateCurriculum()).state_dict()
    for curriculum, size in ((PassRateCurriculum(), 9), (SolvabilityCurriculum(), 8)):
        name = type(curriculum).__name__
        bound(curriculum, size)
        words = rf"^{name} on {size} prompts starts anew: the checkpoint's is PassRateCurriculum on 8\.$"
        with pytest.warns(UserWarning, match=words):
            curriculum.load_state_dict(state)
        assert curriculum.coverage == 0


def rows(batch: Any) -> list[int]:
    return [prompt.row for prompt in batch.prompts]


@pytest.mark.parametrize("ahead", [False, True], ids=["drawn when it comes", "drawn ahead"])
def test_a_batch_is_drawn_when_it_is_asked_for_and_after_a_resume_is_the_same(tokenizer: Any, ahead: bool):
    def make() -> PromptLoader:
        prompts = [Prompt("one", "", "train", row) for row in range(12)]
        curriculum = PassRateCurriculum(prior_strength=0.1, floor=0.01)
        return PromptLoader(
            prompts, PromptFormat(tokenizer), 3, train=True, curriculum=curriculum, shuffle=True, seed=3
        )

    def go_on(loader: PromptLoader, batches: int) -> list[tuple[list[int], list[int]]]:
        seen: list[tuple[list[int], list[int]]] = []
        while True:
            for batch in loader:
                upcoming = batch.upcoming if ahead else None
                observe(loader.curriculum, *((row, row % 2) for row in rows(batch)))
                assert upcoming is None or upcoming is batch.upcoming
                seen.append((rows(batch), batch.visits))
                if len(seen) == batches:
                    return seen

    whole = go_on(make(), 10)  # 4 to an epoch
    assert len({(row, visit) for batch, visits in whole for row, visit in zip(batch, visits, strict=True)}) == 30
    for cut in (1, 4, 6):
        before, after = make(), make()
        go_on(before, cut)
        after.load_state_dict(before.state_dict())
        after.curriculum.load_state_dict(before.curriculum.state_dict())
        assert ("upcoming" in before.state_dict()) == ahead
        assert go_on(after, 10 - cut) == whole[cut:]
    # the second batch is drawn behind the outcomes of the first one, or before them
    alone = bound(PassRateCurriculum(prior_strength=0.1, floor=0.01), 12)
    first = alone.draw(3, 0, 0)
    if not ahead:
        observe(alone, *((row, row % 2) for row in first))
    assert [batch for batch, _ in whole[:2]] == [first, alone.draw(3, 0, 1)]


def test_what_was_drawn_ahead_of_other_data_is_drawn_anew(tokenizer: Any):
    def make(size: int) -> PromptLoader:
        prompts = [Prompt("one", "", "train", row) for row in range(size)]
        format_, curriculum = PromptFormat(tokenizer), PassRateCurriculum()
        return PromptLoader(prompts, format_, 12, train=True, curriculum=curriculum, shuffle=True)

    loader, other = make(12), make(24)
    assert next(iter(loader)).upcoming is not None
    other.load_state_dict(loader.state_dict())  # at the end of an epoch
    assert rows(next(iter(other))) == bound(PassRateCurriculum(), 24, seed=0).draw(12, 1, 0)


def test_an_order_of_ones_own_is_no_draw_at_random():
    for curriculum in each()[1:]:
        with pytest.raises(InputError) as raised:
            bound(curriculum, 8, shuffle=False)
        assert str(raised.value) == (
            f"`data.curriculum`={type(curriculum).__name__} draws prompts at random, which `shuffle: false` and "
            "`trainer.overfit_batches` rule out; leave these out, or the curriculum."
        )


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.1])
def test_a_floor_that_is_none(floor: float):
    with pytest.raises(InputError) as raised:
        SolvabilityCurriculum(floor=floor)
    assert str(raised.value) == (
        f"`SolvabilityCurriculum.floor`={floor} is no share that lets every prompt come; use more than 0 and at "
        "most 1, such as 0.1."
    )
