"""What has changed between two reports of the same benchmark, as ratios NEW / OLD of every number in both.

A report is the JSON that each script here writes. Lists are compared place by place; what is in one of them alone
is named. Whether a higher number is better is for the reader to say: speeds go up, seconds and MiB go down.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def numbers(report: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """Each number of a report with its place, as `runs › prefetch=1 › 0 › seconds`."""
    if isinstance(report, bool) or report is None:
        return
    if isinstance(report, int | float):
        yield " › ".join(path), float(report)
    elif isinstance(report, dict):
        for name, value in report.items():
            if (*path, name) != ("machine",):  # what it ran on is told apart
                yield from numbers(value, (*path, name))
    elif isinstance(report, list):
        for place, value in enumerate(report):
            yield from numbers(value, (*path, str(place)))


def ratios(old: Any, new: Any) -> tuple[dict[str, tuple[float, float, float]], list[str]]:
    """Of each number in both reports: old, new and new / old, farthest from 1 first; and what one alone has."""
    before, after = dict(numbers(old)), dict(numbers(new))
    alone = sorted(before.keys() ^ after.keys())
    both = {
        place: (value, after[place], after[place] / value)
        for place, value in before.items()
        if place in after and value and after[place]
    }
    order = sorted(both, key=lambda place: -abs(math.log(abs(both[place][2]))))
    return {place: both[place] for place in order}, alone


def main() -> None:
    """Parse the arguments and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("old", type=Path, help="an earlier report")
    parser.add_argument("new", type=Path, help="a later one")
    parser.add_argument("--least", type=float, default=0.05, help="changes below it are left out (0.05: 5 %%)")
    parser.add_argument("--only", default="", help="only places that contain this text")
    arguments = parser.parse_args()
    old, new = (json.loads(path.read_text()) for path in (arguments.old, arguments.new))
    both, alone = ratios(old, new)
    machines = [report.get("machine") if isinstance(report, dict) else None for report in (old, new)]
    if machines[0] != machines[1]:
        print(f"Not the same machine or versions:\n  old: {machines[0]}\n  new: {machines[1]}")
    table = Table(title=f"{arguments.new} against {arguments.old}")
    for column in ("", "old", "new", "new / old"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    shown = 0
    for place, (before, after, ratio) in both.items():
        if abs(math.log(abs(ratio))) >= math.log1p(arguments.least) and arguments.only in place:
            table.add_row(place, f"{before:.4g}", f"{after:.4g}", f"{ratio:.2f}")
            shown += 1
    Console().print(table)
    print(f"{shown} of {len(both)} numbers differ by {arguments.least:.0%} or more.")
    if alone:
        print(f"In one of the reports alone: {', '.join(alone[:10])}{' …' if len(alone) > 10 else ''}")


if __name__ == "__main__":
    main()
