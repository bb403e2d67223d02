import math

import numpy as np
import pytest
from drawn import bands_of, draw, lines_of, texts_of
from matplotlib.axes import Axes

from sppo_lightning.figures import calibration_figure, tail_effect_figure, value_against_reward

VALUES = [0.11, 0.15, 0.19, 0.15, 0.85, 0.85, 0.99]


def means_of(main: Axes) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The bins' means, and the ends of the error bars that are drawn."""
    (bars,) = main.containers
    line, _, (errors,) = bars.lines
    ends = [(float(low), float(high)) for (_, low), (_, high) in filter(len, errors.get_segments())]
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)], ends


def test_the_reliability_diagram_shows_each_bins_mean_error_and_count() -> None:
    rewards = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    figure = value_against_reward([*VALUES, 0.5], [*rewards, math.nan])  # the last has no verdict
    main, above, right, corner = figure.axes
    means, ends = means_of(main)
    assert means == [pytest.approx((0.15, 0.25)), pytest.approx((0.85, 0.5)), pytest.approx((0.99, 1.0))]
    # the standard errors: 0, 0, 1, 0 has the variance ¼, 1, 0 has ½, and a single reward has none
    assert ends[0] == pytest.approx((0.25 - 0.25, 0.25 + 0.25))
    assert ends[1] == pytest.approx((0.5 - 0.5, 0.5 + 0.5))
    assert len(ends) == 2
    assert texts_of(main) == ["4", "2", "1"]
    lines = lines_of(main)
    assert lines["perfect calibration"] == ([0, 1], [0, 1])
    assert lines["one response"] == (VALUES, pytest.approx(rewards, abs=0.012))
    assert [patch.get_height() for patch in above.patches] == [0, 4, 0, 0, 0, 0, 0, 0, 2, 1]
    assert [patch.get_width() for patch in right.patches] == [4, 0, 0, 0, 0, 0, 0, 0, 0, 3]
    brier = np.mean((np.array(VALUES) - rewards) ** 2)
    skill = 1 - brier / (3 / 7 * 4 / 7)
    pearson = np.corrcoef(VALUES, rewards)[0, 1]
    # ranks of V: 1, 2.5, 4, 2.5, 5.5, 5.5, 7; of the rewards: 2.5 for the four misses and 6 for the hits
    spearman = np.corrcoef([1, 2.5, 4, 2.5, 5.5, 5.5, 7], [2.5, 2.5, 6, 2.5, 6, 2.5, 6])[0, 1]
    error = (4 * 0.1 + 2 * 0.35 + 0.01) / 7
    numbers = {"ECE": error, "Spearman": spearman, "Pearson": pearson, "Brier skill": skill}
    assert texts_of(corner) == [text for name, x in numbers.items() for text in (name, f"{x:.2f}")]
    assert (figure.get_suptitle(), main.get_ylabel()) == (
        "V against reward, 7 responses",
        "reward R of the response",
    )
    assert draw(figure).startswith(b"\x89PNG")


def test_pass_rates_are_drawn_problem_by_problem() -> None:
    rates = [0.25, 0.0, 0.125, 0.125, 0.75, 1.0, 1.0]
    figure = calibration_figure(VALUES, rates, bins=2, title="Critic calibration at iteration 3")
    main, above, right, corner = figure.axes
    means, ends = means_of(main)
    assert means == [pytest.approx((0.15, 0.125)), pytest.approx((2.69 / 3, 2.75 / 3))]
    # deviations ⅛, ⅛, 0, 0 and 1/6, 1/12, 1/12
    spread = math.sqrt(2 / 64 / 3) / 2
    assert ends[0] == pytest.approx((0.125 - spread, 0.125 + spread))
    spread = math.sqrt((1 / 36 + 2 / 144) / 2 / 3)
    assert ends[1] == pytest.approx((2.75 / 3 - spread, 2.75 / 3 + spread))
    assert texts_of(main) == ["4", "3"]
    assert lines_of(main)["one problem"] == (VALUES, pytest.approx(rates, abs=0.012))
    assert [patch.get_height() for patch in above.patches] == [4, 3]
    assert [patch.get_width() for patch in right.patches] == [4, 3]
    # over two bins: 4 problems are 0.025 off, and 3 are 0.02
    assert texts_of(corner)[:2] == ["ECE", f"{(4 * 0.025 + 0.06) / 7:.2f}"]
    assert figure.get_suptitle() == "Critic calibration at iteration 3, 7 problems"
    draw(figure)


def test_a_critic_that_says_the_same_of_all_has_no_correlation() -> None:
    figure = value_against_reward([0.5] * 4, [0.0, 1.0, 1.0, 1.0])
    corner = texts_of(figure.axes[3])
    assert corner == ["ECE", "0.25", "Spearman", "0.00", "Pearson", "0.00", "Brier skill", f"{1 - 4 / 3:.2f}"]
    draw(figure)


def test_nothing_to_draw_is_drawn_too() -> None:
    for figure in (
        value_against_reward([], []),
        value_against_reward([0.5], [math.nan]),
        calibration_figure([0.5], [1.0]),
        tail_effect_figure([], np.zeros((0, 4))),
    ):
        assert draw(figure).startswith(b"\x89PNG")


def test_values_along_the_response_have_a_mean_and_a_band() -> None:
    correct = [[0.25, 0.5, 0.75, 1.0], [0.75, 0.5, 0.75, 0.5]]
    wrong = [[0.5, 0.25], [0.25, math.nan], [0.75, 0.25]]
    figure = tail_effect_figure(correct, wrong, title="PPO")
    (axes,) = figure.axes
    assert lines_of(axes) == {
        "correct (2 responses)": ([0.125, 0.375, 0.625, 0.875], [0.5, 0.5, 0.75, 0.75]),
        "wrong (3 responses)": ([0.25, 0.75], [0.5, 0.25]),
    }
    solid, dashed = axes.get_lines()
    assert (solid.is_dashed(), dashed.is_dashed()) == (False, True)
    first, second = bands_of(axes)
    assert first == {
        0.125: (0.25, 0.75),
        0.375: (0.5, 0.5),
        0.625: (0.75, 0.75),
        0.875: (0.5, 1.0),
    }
    spread = math.sqrt(0.125 / 3)
    assert second == {0.25: pytest.approx((0.5 - spread, 0.5 + spread)), 0.75: (0.25, 0.25)}
    assert figure.get_suptitle() == "PPO"
    assert axes.get_ylim() == (0.0, 1.02)
    draw(figure)


def test_values_outside_of_0_and_1_are_not_cut_off() -> None:
    (axes,) = tail_effect_figure([[0.5, 2.0]], [[-1.0, 0.5]]).axes
    assert axes.get_ylim() == (-1.0, 2.0)


def test_a_part_of_the_response_that_none_reaches_is_left_out() -> None:
    figure = tail_effect_figure([[0.5, math.nan], [0.75, math.nan]], [[0.5, 0.25]])
    assert lines_of(figure.axes[0]) == {
        "correct (2 responses)": ([0.25], [0.625]),
        "wrong (1 response)": ([0.25, 0.75], [0.5, 0.25]),
    }
    draw(figure)
