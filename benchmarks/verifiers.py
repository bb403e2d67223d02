"""Measures the verifier for mathematics: what it accepts of real gold answers, how fast it is, what it survives.

Run as `python benchmarks/verifiers.py --data ../shared/data`; takes about a minute. The data is any folder of
Parquet files in the layout that PromptFile reads, such as MATH-500 and DAPO-Math-17k.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from sppo_lightning.data import PromptFile
from sppo_lightning.data.layouts import read_source
from sppo_lightning.verification import close_workers, verify_math
from sppo_lightning.verification.comparison import Comparison
from sppo_lightning.verification.extraction import extract_answer
from sppo_lightning.verification.notation import Malformed, normalize
from sppo_lightning.verification.numbers import exact_number
from sppo_lightning.verification.refusals import why_ill_formed

TEXT = "We look at the second equation first, since it has one unknown less, and solve it for $x$. " * 20
HOSTILE = {
    "9**9**9**9": r"\boxed{9**9**9**9}",
    "10^{10^{10}}": r"\boxed{10^{10^{10}}}",
    "(10^6)!": r"\boxed{(10^6)!}",
    "binomial of 10^8": r"\boxed{\binom{100000000}{50000000}}",
    "a power tower in an integral": r"\boxed{\int_0^{1} x^{x^{x^{x}}} dx}",
    "ten thousand nested braces": r"\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}",
    "ten thousand open boxes": r"\boxed{" * 10_000,
    "1 MB of digits": r"\boxed{" + "7" * 1_000_000 + "}",
    "1 MB of digits, no box": "Answer: " + "7" * 1_000_000,
    "invalid unicode": "\\boxed{\ud800\udfff\x00}",
    "NaN": r"\boxed{NaN}",
    "unbalanced LaTeX": r"\boxed{\left(\frac{1}{2}",
    "a hundred boxes": " ".join(rf"\boxed{{{n}}}" for n in range(100)),
    "zeros(100000,100000)": r"\boxed{\operatorname{zeros}(100000,100000)}",
}


def golds_of(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The gold answers of each file."""
    for path in sorted(folder.glob("*.parquet")):
        records, _ = read_source(PromptFile(str(path)))
        yield path.stem, [record.gold for record in records]


def perturbed(gold: str) -> dict[str, str]:
    """The gold answer with its first number raised by 1, with another sign, and with a digit dropped."""
    found = {"sign flipped": gold[1:] if gold.startswith("-") else f"-{gold}"}
    if number := re.search(r"[0-9]+", gold):
        start, end = number.span()
        found["number + 1"] = f"{gold[:start]}{int(number.group()) + 1}{gold[end:]}"
        if end - start > 1:
            found["digit dropped"] = gold[:start] + gold[start + 1 :]
    value = _value(gold)
    # -0 is 0, and 01 without its 0 is 1
    return {kind: text for kind, text in found.items() if value is None or _value(text) != value}


def _value(text: str) -> Fraction | None:
    try:
        return exact_number(normalize(text))
    except Malformed:
        return None


def accepted(golds: list[str]) -> dict[str, tuple[int, int]]:
    """How many gold answers verify as written, and how many perturbed ones, each with their number."""
    pairs = [("itself", gold, gold) for gold in golds]
    pairs += [(kind, text, gold) for gold in dict.fromkeys(golds) for kind, text in perturbed(gold).items()]
    verdicts = verify_math([rf"\boxed{{{text}}}" for _, text, _ in pairs], [gold for *_, gold in pairs])
    right, number = Counter[str](), Counter(kind for kind, *_ in pairs)
    for (kind, text, gold), verdict in zip(pairs, verdicts, strict=True):
        right[kind] += verdict.score == 1.0
        if (verdict.score == 1.0) != (kind == "itself"):
            print(f"    {kind}: {text!r} against {gold!r} is {verdict.status}")
    return {kind: (right[kind], number[kind]) for kind in number}


def per_second(responses: list[str], golds: list[str], workers: int) -> float:
    """Responses a second, with so many workers."""
    start = time.perf_counter()
    verify_math(responses, golds, timeout_seconds=20, workers=workers)
    return len(responses) / (time.perf_counter() - start)


def undecided(golds: list[str]) -> list[tuple[str, str]]:
    """Answers that only a computer algebra system can compare, each a gold answer written in another way."""
    open_pairs = []
    for gold in dict.fromkeys(golds):
        for answer in (f"({gold})+1-1", f"0+({gold})", f"2({gold})", f"\\frac{{2({gold})}}{{2}}"):
            if Comparison(lambda *_: None).agree(normalize(answer), normalize(gold)) is None:
                open_pairs.append((answer, gold))
    return open_pairs


def throughput(sets: dict[str, list[str]]) -> None:
    """Print how many answers a second go through each stage."""
    golds = [gold for each in sets.values() for gold in each]
    responses = [rf"{TEXT}{number}. So the answer is $\boxed{{{gold}}}$." for number, gold in enumerate(golds)]
    start = time.perf_counter()
    for response in responses:
        extract_answer(response)
    speed = len(golds) / (time.perf_counter() - start)
    print(f"extraction        {speed:10,.0f} per second, of {len(TEXT)} characters each")
    easy = [
        (response, gold)
        for response, gold in zip(responses, golds, strict=True)
        if Comparison(lambda *_: None).agree(normalize(gold), normalize(gold)) is not None
    ]
    normalize.cache_clear()
    why_ill_formed.cache_clear()
    speed = per_second([response for response, _ in easy], [gold for _, gold in easy], workers=1)
    print(f"fast path         {speed:10,.0f} per second, extraction included, {len(easy):,} responses")
    hard = undecided(golds)
    boxed = [rf"\boxed{{{answer}}}" for answer, _ in hard]
    per_second(boxed[:4], [gold for _, gold in hard[:4]], workers=1)  # starts the worker
    speed = per_second(boxed, [gold for _, gold in hard], workers=1)
    print(f"sympy in a worker {speed:10,.0f} per second and core, {len(hard):,} answers")


class Watch(threading.Thread):
    """Notes how long the interpreter is held at most, and the memory of worker processes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest, self.memory_bytes, self.done = 0.0, 0, False

    def run(self) -> None:
        """Tick every 2 ms."""
        last = time.perf_counter()
        while not self.done:
            time.sleep(0.002)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last - 0.002), now
            for child in multiprocessing.active_children():
                self.memory_bytes = max(self.memory_bytes, _resident_bytes(child.pid))


def _resident_bytes(pid: int | None) -> int:
    try:
        return int(re.findall(r"VmHWM:\s+([0-9]+)", Path(f"/proc/{pid}/status").read_text())[0]) * 1024
    except (OSError, IndexError):
        return 0  # it has just ended


def hostile(timeout_seconds: float) -> None:
    """Print how long each hostile response takes, and what it does to this process."""
    verify_math([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"], timeout_seconds=20)  # the workers are ready
    watch = Watch()
    watch.start()
    for name, response in HOSTILE.items():
        start = time.perf_counter()
        [verdict] = verify_math([response], [r"2\sqrt{2}"], timeout_seconds=timeout_seconds)
        print(f"    {time.perf_counter() - start:6.3f} s  {verdict.status:10} {name}")
    start = time.perf_counter()
    verify_math(list(HOSTILE.values()), [r"3\sqrt{3}"] * len(HOSTILE), timeout_seconds=timeout_seconds)
    print(f"    {time.perf_counter() - start:6.3f} s  all of them in one batch")
    watch.done = True
    watch.join()
    print(f"    the interpreter was held for {watch.longest * 1000:.0f} ms at most; a worker took", end=" ")
    print(f"{watch.memory_bytes / 2**20:,.0f} MB at most")


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="a folder of Parquet files")
    parser.add_argument("--timeout-seconds", type=float, default=2.0, help="of a hostile answer")
    arguments = parser.parse_args()
    sets = {}
    for name, golds in golds_of(arguments.data):
        bad = {gold: why for gold in dict.fromkeys(golds) if (why := why_ill_formed(gold)) is not None}
        sets[name] = [gold for gold in golds if gold not in bad]
        print(f"{name}: {len(golds):,} gold answers, {len(bad)} ill-formed")
        for gold, why in bad.items():
            print(f"    {gold!r}: {why}")
        for kind, (right, number) in accepted(sets[name]).items():
            print(f"    {kind:14} {right:6,} of {number:6,} accepted")
    print("\nthroughput")
    throughput(sets)
    print("\nhostile responses")
    hostile(arguments.timeout_seconds)
    close_workers()


if __name__ == "__main__":
    main()
