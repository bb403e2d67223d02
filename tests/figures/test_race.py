import itertools
import math

import numpy as np
import pytest
from drawn import bands_of, draw, lines_of
from matplotlib.colors import to_rgb

from sppo_lightning.errors import InputError
from sppo_lightning.figures import Curve, race_figure
from sppo_lightning.figures.race import STYLES

SPPO = [
    Curve([0.0, 600.0, 1200.0], [0, 100, 200], [0.25, 0.5, 0.75]),
    Curve([0.0, 900.0], [0, 200], [0.25, 0.5]),
]
GRPO = [Curve([0.0, 1200.0], [0, 1600], [0.25, 0.7])]


def at(line: tuple[list[float], list[float]], x: float) -> float:
    """A line's height at one of its points."""
    places = np.array(line[0])
    nearest = int(np.abs(places - x).argmin())
    assert places[nearest] == pytest.approx(x, abs=1e-9)
    return line[1][nearest]


def test_the_mean_over_seeds_is_drawn_over_time_with_its_spread() -> None:
    figure = race_figure({"SPPO": SPPO, "GRPO": GRPO}, "seconds", title="A race")
    (axes,) = figure.axes
    lines = lines_of(axes)
    # the last accuracies 0.75 and 0.5 differ by ¼, which makes a standard deviation of ¼ / √2
    assert list(lines) == [f"SPPO  0.625 ± {0.25 / math.sqrt(2):.3f}", "GRPO  0.700"]
    sppo, grpo = lines.values()
    assert (sppo[0][0], sppo[0][-1]) == (0.0, 15.0)  # minutes; the shorter of the two runs ends there
    assert (grpo[0][0], grpo[0][-1]) == (0.0, 20.0)
    # at 900 s the first run is half-way from 0.5 to 0.75, and the second has arrived at 0.5
    assert sppo[1][-1] == pytest.approx((0.625 + 0.5) / 2)
    assert at(sppo, 0.0) == 0.25
    assert grpo[1] == pytest.approx([0.25 + 0.45 * x / 20 for x in grpo[0]])
    (band,) = bands_of(axes)  # one run has no spread
    middle, spread = 0.5625, 0.125 / math.sqrt(2)
    assert band[15.0] == pytest.approx((middle - spread, middle + spread))
    assert band[0.0] == pytest.approx((0.25, 0.25))
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines() if line.get_marker() == "o"]
    assert dots == [pytest.approx((15.0, middle)), pytest.approx((20.0, 0.7))]
    assert axes.get_xlabel() == "training time (min), validation left out"
    assert axes.get_title() == "A race"
    assert draw(figure).startswith(b"\x89PNG")


def test_the_legend_lists_the_best_first() -> None:
    figure = race_figure({"SPPO": SPPO, "GRPO": GRPO}, "seconds")
    (legend,) = figure.legends
    assert [text.get_text().split()[0] for text in legend.get_texts()] == ["GRPO", "SPPO"]
    sppo, grpo = (line for line in figure.axes[0].get_lines() if line.get_marker() != "o")
    assert [line.get_color() for line in legend.get_lines()] == [grpo.get_color(), sppo.get_color()]


def test_over_samples_the_axis_counts_responses() -> None:
    figure = race_figure({"SPPO": SPPO, "GRPO": GRPO}, "samples")
    (axes,) = figure.axes
    sppo, grpo = lines_of(axes).values()
    assert (sppo[0][-1], sppo[1][-1]) == (200, pytest.approx(0.625))
    assert (grpo[0][-1], grpo[1][-1]) == (1600, pytest.approx(0.7))
    assert axes.get_xlabel() == "sampled responses"
    assert axes.xaxis.get_major_formatter()(1500) == "1.5k"
    draw(figure)


def test_a_method_keeps_its_colour_whoever_races_with_it() -> None:
    first = race_figure({"SPPO": SPPO, "GRPO": GRPO}, "seconds").axes[0].get_lines()[0]
    alone = race_figure({"SPPO": SPPO[:1]}, "samples").axes[0].get_lines()[0]
    assert (first.get_color(), first.get_linestyle()) == (alone.get_color(), alone.get_linestyle())


def test_ten_methods_have_ten_styles_and_no_more_are_drawn() -> None:
    methods = {f"method {i}": [Curve([0.0, 1.0], [0, 1], [0.0, i / 10])] for i in range(10)}
    figure = race_figure(methods, "seconds")
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() != "o"]
    assert len({line.get_color() for line in lines}) == 10
    assert len({str(line._dash_pattern) for line in lines}) == 10
    draw(figure)
    with pytest.raises(InputError, match="has 11 methods, more than 10"):
        race_figure(methods | {"one more": GRPO}, "seconds")


# Machado et al. 2009, severity 1.0: what linear red, green and blue become to dichromats
EYES = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)


def lab(colour: str, eye: np.ndarray) -> np.ndarray:
    """CIELAB of a colour as an eye sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = XYZ @ np.clip(eye @ linear, 0, 1) / (0.95047, 1.0, 1.08883)
    f = [np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", EYES)
def test_colour_blind_readers_can_tell_the_colours_apart(eye: str) -> None:
    seen = [lab(colour, EYES[eye]) for colour, _ in STYLES]
    # 2.3 is a just noticeable difference; red and green of one brightness fall below it
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


@pytest.mark.parametrize(
    ("curves", "x", "message"),
    [
        ({"SPPO": SPPO}, "updates", "`x`='updates' is no axis"),
        ({"SPPO": [Curve([0.0, 1.0], [0, 1], [0.5])]}, "seconds", "2 seconds and 1 accuracies"),
        ({"SPPO": [Curve([1.0, 0.0], [0, 1], [0.5, 0.6])]}, "seconds", "with the seconds rising"),
        ({"SPPO": [Curve([], [], [])]}, "samples", "0 samples and 0 accuracies"),
        ({"SPPO": []}, "samples", "'SPPO' have no samples in common"),
        (
            {"SPPO": [Curve([0.0, 1.0], [0, 1], [0.5, 0.6]), Curve([2.0, 3.0], [0, 1], [0.5, 0.6])]},
            "seconds",
            "have no seconds in common",
        ),
    ],
)
def test_what_cannot_be_raced_is_refused(curves: dict, x: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        race_figure(curves, x)  # type: ignore[arg-type]


def test_a_race_of_nobody_has_a_picture() -> None:
    assert draw(race_figure({}, "seconds")).startswith(b"\x89PNG")
