"""What the figures share: colours, axes and units."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart (jfly.uni-koeln.de/color)
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#8A8A8A"


def tidy(axes: Axes) -> None:
    """A light grid behind the data, and no frame at the top and the right."""
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(axes: Axes, ncols: int = 2) -> None:
    """The legend under the axes' label, where it hides no data; none where nothing has a name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=ncols, frameon=False)


def time_unit(seconds: float) -> tuple[float, str]:
    """The seconds of the unit in which a run of this many `seconds` is told, and the unit's name."""
    if seconds >= 3 * 3600:
        return 3600.0, "h"
    return (60.0, "min") if seconds >= 600 else (1.0, "s")


def percent() -> PercentFormatter:
    """Labels for an axis from 0 to 1."""
    return PercentFormatter(1.0, decimals=0)


def counted(number: int, unit: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{number} {unit}{'' if number == 1 else 's'}"
