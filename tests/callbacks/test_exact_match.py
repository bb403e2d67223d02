from typing import Any

import pytest

from sppo_lightning.batch import Prompt
from sppo_lightning.callbacks.exact_match import ExactMatch
from sppo_lightning.errors import InputError


@pytest.mark.parametrize(
    ("extract", "response", "gold", "expected"),
    [
        ("boxed", r"so \boxed{ 5 }", "5", 1.0),
        ("boxed", r"\boxed{5} no, \boxed{6}", "5", 0.0),
        ("boxed", r"\boxed{5", "5", 0.0),
        ("boxed", "5", "5", 0.0),
        ("boxed", r"\boxed{a  b}", "a b", 1.0),
        ("boxed", r"\boxed{ab}", "a b", 0.0),
        ("whole", " 5\n", "5", 1.0),
        ("whole", "it is 5", "5", 0.0),
        ("boxed", r"\boxed{}", "", None),
    ],
)
def test_exact_match(extract: Any, response: str, gold: str, expected: float | None):
    prompt = Prompt(text="", gold=gold, dataset="sums", row=0)
    assert ExactMatch(extract=extract).score([prompt], [response]) == [expected]


def test_exact_match_knows_its_settings():
    with pytest.raises(InputError, match="extract"):
        ExactMatch(extract="last")  # type: ignore[arg-type]
