"""Whether an answer is the gold answer: by structure first, then part by part.

Three-valued: `True` and `False` are final, `None` is what only a computer algebra system can say. The rules are the
same in the trainer, whose `leaf` knows nothing, and in a worker, whose `leaf` is `symbolic.equal`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from sppo_lightning.verification.numbers import based_number, exact_number, quantity
from sppo_lightning.verification.refusals import is_refused
from sppo_lightning.verification.structure import (
    Group,
    as_group,
    group_of,
    is_name,
    is_words,
    items_of,
    option_of,
    relation_of,
    sides_of,
    split,
    words_of,
)

_STATEMENT = re.compile(r"\\(?:equiv|pmod|cong|sim|perp|parallel|to|mapsto|implies|star)(?![A-Za-z])")  # no value
_CLOCK = re.compile(r"[0-9]:[0-9]{2}")

Leaf = Callable[[str, str], bool | None]  # whether two expressions, as canonical text, are equal


class Comparison:
    """The rules of `agree`, with what decides about expressions and how near two numbers must be.

    Args:
        leaf: Decides about expressions that are neither numbers nor words; `None` for whatever it leaves open.
        numeric_tolerance: Relative distance up to which two numbers are equal; 0 for exactly.
    """

    def __init__(self, leaf: Leaf, numeric_tolerance: float = 0.0) -> None:
        self.leaf = leaf
        self.tolerance = Fraction(numeric_tolerance)

    def agree(self, answer: str, gold: str) -> bool | None:
        """Whether canonical texts mean the same."""
        if answer == gold:
            return True
        answers, golds = items_of(answer), items_of(gold)
        if len(golds) > 1 and len(answers) == 1 and "," in answer:
            answers = tuple(split(answer, ",;"))  # `100,200` is a number, but not where two are asked for
        if len(answers) > 1 or len(golds) > 1:
            return self._lists(answers, golds)
        sides, gold_sides = sides_of(answer), sides_of(gold)
        if len(sides) > 1 or len(gold_sides) > 1:
            return self._equations(sides, gold_sides)
        left, right = group_of(answer), group_of(gold)
        if _names_another_variable(answer, gold):
            return False
        if left and right:
            return self._groups(left, right)
        if left or right:
            return self._group_and_text(left, right, answer, gold)
        return self._scalars(answer, gold)

    def _lists(self, answers: Sequence[str], golds: Sequence[str]) -> bool | None:
        """Lists without brackets, at least one of them of several items."""
        found, wanted = as_group(answers), as_group(golds)
        if found is None or wanted is None:
            return False
        return self._groups(found, wanted)

    def _groups(self, answer: Group, gold: Group) -> bool | None:
        if {answer.kind, gold.kind} == {"named", "()"}:  # x=1, y=2 and (1, 2)
            answer, gold = (_values(each) for each in (answer, gold))
        kinds = {answer.kind, gold.kind}
        if len(kinds) > 1 and kinds != {"list", "set"}:
            return False
        if kinds <= {"list", "set", "union", "named"}:
            return self._unordered(answer, gold)
        if kinds == {":"} and len(answer.items) == len(gold.items):
            return self._ratio(answer, gold)
        if len(answer.items) != len(gold.items):
            return False
        if sum(sign in item for item in gold.items for sign in "±∓") > 1:
            return answer.items == gold.items  # signs that go together
        return _all(self.agree(a, g) for a, g in zip(answer.items, gold.items, strict=True))

    def _ratio(self, answer: Group, gold: Group) -> bool | None:
        """2:4 is 1:2, but 2:60 is not 3:00."""
        numbers = [[exact_number(item) for item in each.items] for each in (answer, gold)]
        if any(None in each or 0 in each for each in numbers) or _CLOCK.search(":".join(gold.items)):
            return _all(self.agree(a, g) for a, g in zip(answer.items, gold.items, strict=True))
        return len({a / g for a, g in zip(*numbers, strict=True)}) == 1

    def _unordered(self, answer: Group, gold: Group) -> bool | None:
        """Whether each item has its own partner: equality is transitive, so that the first one will do."""
        left, right = (
            list(dict.fromkeys(each.items)) if each.kind == "set" else list(each.items) for each in (answer, gold)
        )
        if len(left) != len(right):
            return False
        is_open = False
        for item in left:
            verdicts = [self.agree(item, other) for other in right]
            if True in verdicts:
                del right[verdicts.index(True)]
            elif None in verdicts:
                is_open = True
            else:
                return False
        return None if is_open else True

    def _group_and_text(self, left: Group | None, right: Group | None, answer: str, gold: str) -> bool | None:
        """A group against something else, such as a column vector named by its unit vectors."""
        if is_words(answer) or is_words(gold):
            return False
        kind = (left or right).kind  # type: ignore[union-attr]
        if kind in ("list", "set", "union", "named", ":", "[") or is_refused(answer, gold):
            return False
        return self.leaf(answer, gold)

    def _equations(self, answer: list[str], gold: list[str]) -> bool | None:
        """Sides of equations: `x=5` says 5, `41=42` says both, `y=2x` is one where the gold answer is one."""
        if len(gold) == 1:
            values = [side for side in answer if not is_name(side, gold[0])] or answer[1:]
            return _all(self.agree(side, gold[0]) for side in values)
        if len(answer) == 1:
            values = [side for side in gold if not is_name(side)] or gold[1:]
            return self.agree(answer[0], values[0]) if len(values) == 1 else False
        if len(gold) > 2 or len(answer) > 2:
            return False
        answer, gold = (
            sides[::-1] if is_name(sides[1]) and not is_name(sides[0]) else sides for sides in (answer, gold)
        )
        if answer[0] == gold[0] and is_name(gold[0]):
            return self.agree(answer[1], gold[1])
        if is_name(answer[0]) and is_name(gold[0]) and exact_number(answer[1]) is not None:
            return False  # x=5 is not y=5
        left, right = "=".join(answer), "=".join(gold)
        return False if is_refused(left, right) else self.leaf(left, right)

    def _scalars(self, answer: str, gold: str) -> bool | None:
        given, wanted = exact_number(answer), exact_number(gold)
        if given is not None and wanted is not None:
            return self._near(given, wanted)
        bases = based_number(answer), based_number(gold)
        if any(bases):
            return bases[0] == bases[1]
        if letter := option_of(gold):
            return option_of(answer) == letter
        if _CLOCK.search(gold):
            return words_of(answer) == words_of(gold)
        if _STATEMENT.search(gold):
            return words_of(answer) == words_of(gold)
        right = quantity(gold, "any")
        left = quantity(answer, right.unit)
        if left.unit or right.unit:
            if left.unit and right.unit and left.unit != right.unit:
                return False
            if quantity(left.body).unit or quantity(right.body).unit:
                return False  # 5 cm cm
            return self.agree(left.body, right.body)
        if is_words(gold) or is_words(answer):
            return words_of(answer) == words_of(gold)
        return False if is_refused(answer, gold) else self.leaf(answer, gold)

    def _near(self, given: Fraction, wanted: Fraction) -> bool:
        return given == wanted or abs(given - wanted) <= self.tolerance * abs(wanted)


def _names_another_variable(answer: str, gold: str) -> bool:
    """Whether both are inequalities, of different variables: `t > 3` is not `x > 3`."""
    relations = relation_of(answer), relation_of(gold)
    return all(relations) and relations[0][0] != relations[1][0]  # type: ignore[index]


def _values(group: Group) -> Group:
    """Named values as a tuple, in the order of their names."""
    return group if group.kind == "()" else Group("()", tuple(sides_of(item)[1] for item in sorted(group.items)))


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return False if False in found else None if None in found else True
