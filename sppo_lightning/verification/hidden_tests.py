"""Test cases that the reward never sees: what passes the others alone was not solved."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Tests = Mapping[str, Any]  # as `run_tests` describes them


def split_tests(tests: Tests, hidden_share: float, key: str) -> tuple[Tests, Tests | None]:
    """Split a problem's tests into those that are rewarded and those that are kept from the reward.

    Which case is hidden depends on `key` and on what the cases hold, not on their order. Every case is on one side,
    equal cases are on the same one, and at least one stays visible. Of `asserts`, each assert is a case and the
    statements around them go to both sides; where one stands inside a loop, a `try` or the like, all stay visible.

    Args:
        tests: `{"kind": "function", …}`, `{"kind": "stdio", …}` or `{"kind": "asserts", …}`, see `run_tests`.
        hidden_share: Share of the different cases to hide, from 0 to below 1, rounded to whole cases.
        key: What tells one problem, or one run's choice, from another.

    Returns:
        The visible and the hidden tests, of the same kind; None for the latter where nothing is hidden.

    Raises:
        ValueError: For a share that leaves nothing visible.
    """
    if not 0 <= hidden_share < 1:
        raise ValueError(f"A hidden share of {hidden_share} leaves no visible case; use 0 or more, and below 1.")
    if tests.get("kind") == "asserts":
        return _split_asserts(tests, hidden_share, key)
    cases = tests.get("cases")
    if not isinstance(cases, Sequence):
        return tests, None
    hidden = _hidden([json.dumps(case, sort_keys=True, default=repr) for case in cases], hidden_share, key)
    if not any(hidden):
        return tests, None
    pairs = list(zip(cases, hidden, strict=True))
    visible, kept = ([case for case, hide in pairs if hide == side] for side in (False, True))
    return {**tests, "cases": visible}, {**tests, "cases": kept}


def _hidden(contents: Sequence[str], share: float, key: str) -> list[bool]:
    """Which cases are hidden, by what they hold."""

    def digest(content: str) -> bytes:
        return hashlib.blake2b(f"{key}\x00{content}".encode(errors="backslashreplace")).digest()

    different = sorted(set(contents), key=digest)
    count = min(int(share * len(different) + 0.5), len(different) - 1)
    chosen = set(different[: max(count, 0)])
    return [content in chosen for content in contents]


def _split_asserts(tests: Tests, share: float, key: str) -> tuple[Tests, Tests | None]:
    try:
        tree = ast.parse(tests["code"])
        # there an assert depends on the statements before it, which both sides have, and on no other assert
        asserts = [body[i] for body in _places(tree) for i in range(len(body)) if isinstance(body[i], ast.Assert)]
        if len(asserts) < sum(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            return tests, None
        hidden = _hidden([ast.unparse(node) for node in asserts], share, key)
        if not any(hidden):
            return tests, None
        visible, kept = (
            {**tests, "code": ast.unparse(_without(tree, {i for i, hide in enumerate(hidden) if hide != side}))}
            for side in (False, True)
        )
    except (KeyError, TypeError, SyntaxError, ValueError, RecursionError, MemoryError):
        return tests, None  # `plan` says what is wrong with them
    return visible, kept


def _places(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """The bodies whose asserts are independent: the module's, and that of `def check(candidate)` (HumanEval)."""
    yield tree.body
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and len(node.args.args) == 1:
            yield node.body


def _without(tree: ast.Module, left_out: set[int]) -> ast.Module:
    """The tree without some of its asserts, counted as `_places` lists them."""
    tree = copy.deepcopy(tree)
    number = 0
    for body in _places(tree):
        kept = []
        for statement in body:
            is_assert = isinstance(statement, ast.Assert)
            if not (is_assert and number in left_out):
                kept.append(statement)
            number += is_assert
        body[:] = kept or [ast.Pass()]
    return tree
