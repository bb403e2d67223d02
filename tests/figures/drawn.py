"""What a figure has drawn, and whether it can be drawn at all."""

import io
import warnings
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure


def lines_of(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """The labelled lines' coordinates."""
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def bands_of(axes: Axes) -> list[dict[float, tuple[float, float]]]:
    """The bands' lower and upper edge by place."""
    found = []
    for band in axes.collections:
        if not isinstance(band, PolyCollection):
            continue
        edges: dict[float, list[float]] = {}
        for x, y in band.get_paths()[0].vertices.tolist():
            edges.setdefault(x, []).append(y)
        found.append({x: (min(ys), max(ys)) for x, ys in edges.items()})
    return found


def draw(figure: Figure) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a layout that does not fit warns
        figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def texts_of(axes: Axes) -> list[Any]:
    return [text.get_text() for text in axes.texts]
