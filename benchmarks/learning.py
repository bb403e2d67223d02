"""The race: SPPO against its relatives on the embedded task, from the same warm starts, by time and by samples.

Two protocols. `prompts` is the paper's: every method sees the same prompts per iteration, so GRPO samples eight
times as much. `samples` gives every method the same number of responses per iteration. Learning rates are scanned
with the same budget for every method: four runs, of the policy's rate alone or, where there is a critic, of both,
and a fifth where the best lies at the edge; the best two run on a second warm start, and the mean of both decides.
Neither warm start is raced. The rest of the family follows with one run each, at the rates of the nearest racer.
Every run has a core to itself. Finished runs are kept: started again, the script goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pass_rates
import race_report as report
import torch
from race_runs import FAMILY, METHODS, Method, Rates, Run, grid, race, warm_model, warm_start

SCAN_SEEDS = (100, 101)  # of the warm starts on which learning rates are chosen
Pair = tuple[Method, str]  # method and protocol
Runs = Mapping[Pair, Sequence[Run]]


@dataclass(frozen=True)
class Race:
    """The plan of a race: warm starts, the scan of learning rates, the race itself, and the family behind it."""

    methods: Sequence[Method]
    seeds: Sequence[int]
    seconds: float
    scan_seconds: float
    jobs: int
    folder: Path

    @property
    def pairs(self) -> list[Pair]:
        """What is raced; a method with one response per prompt has one protocol."""
        protocols = ("prompts", "samples")
        return [(m, p) for m in self.methods for p in protocols if m.responses > 1 or p == "prompts"]

    def side_by_side(self, task: Callable[[Any], None], rows: Iterable[Any]) -> None:
        """The task for every row, so many at a time."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(task, rows))

    def run(self, runs: Iterable[Run]) -> None:
        """Those runs that are not there yet."""
        self.side_by_side(lambda run: race(run, self.folder), runs)

    def warm_starts(self) -> None:
        """Those warm starts that are not there yet."""
        self.side_by_side(lambda seed: warm_start(self.folder, seed), [*SCAN_SEEDS, *self.seeds])

    def scan(self) -> tuple[Runs, dict[tuple[str, str], Rates]]:
        """All runs of the scan, and the rates that it chose, by the method's name and protocol."""
        scan = {
            (m, protocol): [self._scanned(m, protocol, rates) for rates in grid(m)]
            for m, protocol in self.pairs
            if m.lr_of is None
        }
        self.run(run for runs in scan.values() for run in runs)
        for (method, protocol), runs in scan.items():  # one step further where the best lies at the edge
            policy, critic = max(runs, key=self._score).rates
            tried = [run.rates[0] for run in runs]
            if policy in (min(tried), max(tried)):
                further = policy * 2 if policy == max(tried) else policy / 2
                runs.append(self._scanned(method, protocol, (further, critic)))
        self.run(run for runs in scan.values() for run in runs)
        finals = {
            pair: [
                (run, self._scanned(*pair, run.rates, SCAN_SEEDS[1])) for run in sorted(runs, key=self._score)[-2:]
            ]
            for pair, runs in scan.items()
        }
        self.run(second for both in finals.values() for _, second in both)
        best = {}
        for (method, protocol), both in finals.items():
            best[method.name, protocol] = max(both, key=lambda runs: sum(map(self._score, runs)))[0].rates
            scan[method, protocol] += [second for _, second in both]
        return scan, best

    def _scanned(self, method: Method, protocol: str, rates: Rates, seed: int = SCAN_SEEDS[0]) -> Run:
        return Run(method, protocol, rates, seed, self.scan_seconds, samples=4, validations=3)

    def _score(self, run: Run) -> float:
        return report.scan_score(self.folder / run.folder)

    def raced(self, best: Mapping[tuple[str, str], Rates]) -> tuple[Runs, Runs]:
        """The runs of the race, and those of the rest of the family, done."""

        def rates(method: Method, protocol: str) -> Rates:
            name = method.lr_of or method.name
            return best[name, protocol] if (name, protocol) in best else best[name, "prompts"]

        raced = {
            (m, protocol): [Run(m, protocol, rates(m, protocol), seed, self.seconds) for seed in self.seeds]
            for m, protocol in self.pairs
        }
        # seed by seed, so that what disturbs the machine for a while disturbs all methods
        self.run(runs[i] for i in range(len(self.seeds)) for runs in raced.values())
        names = {method.name for method in self.methods}
        family = {
            (m, "samples"): [Run(m, "samples", m.rates or rates(m, "samples"), self.seeds[0], self.seconds)]
            for m in FAMILY
            if m.lr_of in names
        }
        self.run(run for runs in family.values() for run in runs)
        return raced, family

    def folders(self, runs: Runs) -> dict[report.Key, list[tuple[Path, Rates]]]:
        """The runs as the report wants them."""
        return {
            (method.name, protocol): [(self.folder / run.folder, run.rates) for run in row]
            for (method, protocol), row in runs.items()
        }


def main() -> None:
    """Warm starts, scan, race, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the race, each with a warm start of its own")
    parser.add_argument("--seconds", type=float, default=75, help="training time of a run of the race")
    parser.add_argument("--scan-seconds", type=float, default=40, help="training time of a run of the scan")
    parser.add_argument("--methods", default="", help="names, separated by ';'; all when left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"), help="where everything goes")
    parser.add_argument("--figures", type=Path, default=None, help="folder for the figures, docs for instance")
    arguments = parser.parse_args()
    asked = set(filter(None, arguments.methods.split(";")))
    asked |= {m.lr_of for m in METHODS if m.name in asked and m.lr_of}
    chosen = [m for m in METHODS if not asked or m.name in asked]
    folder, seeds = arguments.folder, range(1, arguments.seeds + 1)
    plan = Race(chosen, seeds, arguments.seconds, arguments.scan_seconds, arguments.jobs, folder)
    plan.warm_starts()
    scan, best = plan.scan()
    raced, family = plan.raced(best)
    figures = arguments.figures or folder
    figures.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    report.write(
        plan.folders(raced),
        plan.folders(scan),
        plan.folders(family),
        pass_rates.report({str(seed): warm_model(folder, seed) for seed in seeds}, figures),
        {method.name for method in METHODS if method.lr_of},
        folder,
        figures,
    )


if __name__ == "__main__":
    main()
