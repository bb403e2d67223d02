"""Ways to meet prompts that the policy hardly ever solves: which learns the hardest ones with fewest tokens.

The embedded task, of which nothing but a whole worked solution is right, with nearly all prompts so long that the
warm-started model never solves them. Every arm has the same settings, the same warm starts and the same budget of
generated tokens, those of searches and extra samples included; a run ends sooner when the hardest prompts are
solved. Every run has a core to itself. Finished runs are kept: started again, the script goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import exploration_report as report
from exploration_arms import Run, arms
from race_runs import race, warm_start


def main() -> None:
    """Warm starts, runs, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds, each with a warm start of its own")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="generated in training, until a run ends")
    parser.add_argument("--every-tokens", type=int, default=40_000, help="from one validation to the next")
    parser.add_argument("--enough", type=float, default=0.6, help="accuracy on the hardest band that ends a run")
    parser.add_argument("--batch", type=int, default=128, help="prompts of an iteration")
    parser.add_argument("--easy", type=float, default=0.02, help="share of the prompts that are not of the hardest")
    parser.add_argument("--arms", default="", help="names, separated by ';'; all when left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/exploration"), help="where everything goes")
    parser.add_argument("--figures", type=Path, default=None, help="folder for the figures, docs for instance")
    arguments = parser.parse_args()
    names = set(filter(None, arguments.arms.split(";")))
    known = arms(arguments.batch)
    if unknown := names - {arm.name for arm in known}:
        parser.error(f"--arms has {sorted(unknown)}; there are {[arm.name for arm in known]}")
    chosen = [arm for arm in known if not names or arm.name in names]
    seeds = range(1, arguments.seeds + 1)
    settings = (arguments.tokens, arguments.every_tokens, arguments.enough, arguments.batch, arguments.easy)
    # seed by seed, so that what disturbs the machine for a while disturbs all arms
    runs = [Run(arm, seed, *settings) for seed in seeds for arm in chosen]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda seed: warm_start(arguments.folder, seed), seeds))
        list(pool.map(lambda run: race(run, arguments.folder), runs))
    by_arm = {arm.name: [arguments.folder / run.folder for run in runs if run.arm is arm] for arm in chosen}
    report.write(by_arm, arguments.folder, arguments.figures or arguments.folder)


if __name__ == "__main__":
    main()
