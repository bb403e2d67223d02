import math
from typing import Any

import pytest
from drawn import draw, lines_of

from sppo_lightning.figures import learning_curve
from sppo_lightning.figures.learning import running_mean


def validation(seconds: float, **rates: float) -> dict[str, Any]:
    metrics = {f"val/{name}/avg@4": rate for name, rate in rates.items()}
    return {"iteration": 0, "seconds": seconds, "metrics": metrics | {"val/all/greedy": 0.9}}


CURVE = [{"seconds": float(i), "reward": 0.25 + 0.25 * i, "value": 0.5, "response_tokens": 9.0} for i in range(3)]


def test_running_mean_is_the_mean_of_a_tenth_around_each_value() -> None:
    assert running_mean([1.0, 5.0, 3.0]).tolist() == [1.0, 5.0, 3.0]
    # 20 values: one neighbour on each side, none beyond the ends
    values = [0.0, 3.0, 6.0, *([3.0] * 17)]
    assert running_mean(values).tolist()[:4] == [1.5, 3.0, 4.0, 4.0]
    assert running_mean([*values[:-1], math.nan])[-1] == 3.0
    assert running_mean([math.nan] * 20).tolist() == pytest.approx([math.nan] * 20, nan_ok=True)


def test_accuracy_is_drawn_over_time_with_before_and_after_in_the_legend() -> None:
    validations = [validation(0.0, easy=0.5, hard=0.1, all=0.3), validation(40.0, easy=0.9, hard=0.5, all=0.7)]
    figure = learning_curve(CURVE, validations, title="a run")
    held_out, training = figure.axes
    assert lines_of(held_out) == {
        "all  0.30 → 0.70": ([0.0, 40.0], [0.3, 0.7]),
        "easy  0.50 → 0.90": ([0.0, 40.0], [0.5, 0.9]),
        "hard  0.10 → 0.50": ([0.0, 40.0], [0.1, 0.5]),
    }
    marked = [line for line in held_out.get_lines() if line.get_markersize() == 7.5]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marked[:2]] == [(0.0, 0.3), (40.0, 0.7)]
    assert marked[0].get_markerfacecolor() == "white"
    assert held_out.get_xlabel() == training.get_xlabel() == "training time (s), validation left out"
    assert lines_of(training) == {
        "reward": ([0.0, 1.0, 2.0], [0.25, 0.5, 0.75]),
        "critic's mean V": ([0.0, 1.0, 2.0], [0.5, 0.5, 0.5]),
    }
    assert figure.get_suptitle() == "a run"
    assert draw(figure).startswith(b"\x89PNG")


def test_a_control_is_dashed_in_the_colour_of_its_data_set() -> None:
    validations = [validation(0.0, sums=0.25), validation(60.0, sums=0.75)]
    control = [validation(0.0, sums=0.25), validation(90.0, sums=0.5)]
    figure = learning_curve(CURVE, validations, control=control)
    held_out = figure.axes[0]
    assert list(lines_of(held_out)) == ["sums  0.25 → 0.75  (control 0.50)", "control"]
    dashed, solid = held_out.get_lines()[:2]
    assert (list(dashed.get_xdata()), list(dashed.get_ydata())) == ([0.0, 90.0], [0.25, 0.5])
    assert (dashed.is_dashed(), solid.is_dashed()) == (True, False)
    assert dashed.get_color() == solid.get_color()
    assert held_out.get_xlim()[1] > 90
    draw(figure)


def test_long_runs_count_in_minutes_and_supervised_ones_show_the_loss() -> None:
    curve = [{"seconds": 600.0 * i, "loss": 4.0 / (i + 1)} for i in range(3)]
    figure = learning_curve(curve, [validation(1200.0, sums=0.5)])
    held_out, training = figure.axes
    assert lines_of(held_out) == {"sums  0.50 → 0.50": ([20.0], [0.5])}
    assert lines_of(training) == {"loss per token": ([0.0, 10.0, 20.0], pytest.approx([4.0, 2.0, 4 / 3]))}
    assert training.get_xlabel() == "training time (min), validation left out"
    assert training.get_yscale() == "log"
    draw(figure)


def test_runs_of_many_hours_count_in_hours() -> None:
    figure = learning_curve([], [validation(0.0, sums=0.25), validation(5 * 3600.0, sums=0.5)])
    assert lines_of(figure.axes[0]) == {"sums  0.25 → 0.50": ([0.0, 5.0], [0.25, 0.5])}
    assert figure.axes[0].get_xlabel() == "training time (h), validation left out"


def test_a_run_without_anything_still_has_a_picture() -> None:
    for curve in ([], [{"seconds": 1.0, "reward": None, "value": None}]):
        figure = learning_curve(curve, [])
        assert [list(axes.get_lines()) for axes in figure.axes] == [[], []]
        assert draw(figure).startswith(b"\x89PNG")
