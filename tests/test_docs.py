"""The Python of the documentation runs as it stands, and does what is said beside it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from by_hand import ByHand, assert_equal, run
from given import outcomes
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks import ExactMatch, HackingMonitor
from sppo_lightning.verification.drift import Limits

ROOT = Path(__file__).resolve().parents[1]


def names_in(page: str, marker: str) -> dict[str, Any]:
    """What the page's Python block with `marker` defines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if marker in block]
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def test_an_advantage_of_ones_own():
    advantage = names_in("docs/algorithms.md", "HalfBaseline")["HalfBaseline"]()
    assert advantage(outcomes([(0, 1.0, 0.0), (1, 0.0, 0.0)])).tolist() == [0.75, -0.25]
    module, _ = run(advantage=advantage)
    hand = ByHand()
    for row in hand.rows:
        row["V"] = row["V"] / 2
    policy, _ = hand.policy_losses(hand.rows)
    policy.backward()
    ours = {name: g for name, g in module.gradients[0].items() if name.startswith("policy.")}
    assert_equal(ours, {f"policy.{name}": p.grad for name, p in hand.policy.named_parameters()})


@pytest.mark.parametrize(("page", "name"), [("README.md", "CountsVowels"), ("docs/verifiers.md", "Brief")])
def test_a_verifier_of_ones_own(page: str, name: str):
    verifier = names_in(page, f"class {name}")[name]()
    scores = verifier.score([Prompt("", "", "any", 0)] * 2, ["aeiou", "xyz" * 100])
    assert scores == ([1.0, 0.0] if name == "CountsVowels" else [0.975, 0.0])


def test_a_monitor_in_yaml():
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/verifiers.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "HackingMonitor" in block]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    made = parser.instantiate_classes(parser.parse_object(yaml.safe_load(block))).callbacks
    monitor = made[-1]
    assert isinstance(monitor, HackingMonitor)
    (check,) = monitor.checks
    assert isinstance(check, ExactMatch)
    assert check.name == "strict"
    assert monitor.limits == Limits(spam_growth=None)
    assert monitor.stop_on_alarm


def test_the_monitors_defaults_are_those_of_the_table():
    rows = re.findall(
        r"\| `(\w+)`[^|]*\| ([0-9.]+) \|$", (ROOT / "docs/verifiers.md").read_text(), flags=re.MULTILINE
    )
    assert {name: float(value) for name, value in rows} == vars(Limits())
