"""An asserted expression, taken apart: what a submission must compute goes into the sandbox, the rest stays out.

Of `abs(f(2) - 0.5) < 1e-6` only `f(2)` goes in. Constants, comparisons, arithmetic, `and`, `or`, `not`, and a few
functions stay: what is expected cannot be read inside, and no object of a submission takes part in the comparison.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from sppo_lightning.verification.operations import (
    BINARY,
    BUILDERS,
    CHECKS,
    COMPARISONS,
    CONSTANTS,
    TEXT_METHODS,
    TYPES,
    UNARY,
    Inside,
    arithmetic,
    literal,
)

MAX_ROUNDS = 2_000  # of a loop or comprehension that is unrolled

Answer = tuple[bool, Any]  # whether it could be computed inside, and its value or what was raised
Answers = Sequence[Answer]
Run = Callable[[Answers], Any]


class Unanswered(Exception):
    """Raised where a value is needed that the sandbox did not give."""


@dataclass(frozen=True)
class Part:
    """A part of an expression: a constant, what only the sandbox knows, or something computed of both."""

    kind: Literal["constant", "inside", "mixed"]
    run: Run
    node: ast.expr


@dataclass
class _Place:
    """Where the answer for an expression will stand among the answers."""

    node: ast.expr
    number: int = -1


class Question:
    """What a sandbox is asked to decide an expression.

    Args:
        known: Values of the names that are constants.
        functions: Whether calls of `sorted` and the like are Python's own. Tests of a function of such a name leave
            nothing to ask otherwise.
    """

    def __init__(self, test: ast.expr, known: Mapping[str, Any], functions: bool = True) -> None:
        self.known = known
        self.functions = functions
        self._places: list[_Place] = []
        self.constants = False  # whether any is part of it
        self._run = self._use(self._part(test, {}))
        self._places.sort(key=lambda place: (place.node.lineno, place.node.col_offset))  # the order of evaluation
        for number, place in enumerate(self._places):
            place.number = number
        self.inside = [place.node for place in self._places]
        # what compares nothing but objects of the submission's own class can be decided nowhere else
        places = {id(node): place for place, node in enumerate(self.inside)}
        self.whole = None if self.constants else ast.unparse(_with_places(test, places))

    def holds(self, answers: Answers) -> bool:
        """Whether the expression is true, given the answers for those inside; raises `Unanswered`."""
        return bool(self._run(answers))

    def _use(self, part: Part) -> Run:
        if part.kind == "inside":
            place = _Place(part.node)
            self._places.append(place)
            return lambda answers: _value(answers[place.number])
        self.constants = self.constants or part.kind == "constant"
        return part.run

    def _part(self, node: ast.expr, bound: Mapping[str, Any]) -> Part:
        try:
            return getattr(self, f"_{type(node).__name__.lower()}", self._other)(node, bound)
        except Inside:
            return self._other(node, bound)

    def _other(self, node: ast.expr, bound: Mapping[str, Any]) -> Part:
        if bound:
            node = _Filled(bound).visit(copy.deepcopy(node))
        return Part("inside", _nothing, node)

    def _of(self, node: ast.expr, parts: Sequence[Part], compute: Callable[..., Any]) -> Part:
        """`compute` of the parts; at once, where all are constants."""
        if all(part.kind == "constant" for part in parts):
            try:
                value = compute(*(part.run(()) for part in parts))
            except Exception as error:  # as it would inside, where it is the case's outcome
                raise Inside from error
            return _constant(value, node)
        runs = [self._use(part) for part in parts]
        return Part("mixed", lambda answers: compute(*(run(answers) for run in runs)), node)

    def _constant(self, node: ast.Constant, bound: Mapping[str, Any]) -> Part:
        return _constant(node.value, node)

    def _name(self, node: ast.Name, bound: Mapping[str, Any]) -> Part:
        for names in (bound, self.known, TYPES):
            if node.id in names:
                return _constant(names[node.id], node)
        raise Inside

    def _attribute(self, node: ast.Attribute, bound: Mapping[str, Any]) -> Part:
        if ast.unparse(node) not in CONSTANTS:
            raise Inside
        return _constant(CONSTANTS[ast.unparse(node)], node)

    def _compare(self, node: ast.Compare, bound: Mapping[str, Any]) -> Part:
        parts = [self._part(each, bound) for each in (node.left, *node.comparators)]
        if isinstance(node.ops[0], ast.Is | ast.IsNot) and all(part.kind != "constant" for part in parts):
            raise Inside  # identity is lost on the way out, and nothing can pretend to it
        steps = [COMPARISONS[type(op)] for op in node.ops]
        return self._of(
            node, parts, lambda *all_: all(step(*pair) for step, pair in zip(steps, pairwise(all_), strict=True))
        )

    def _boolop(self, node: ast.BoolOp, bound: Mapping[str, Any]) -> Part:
        decide = all if isinstance(node.op, ast.And) else any
        parts = [self._part(each, bound) for each in node.values]
        if all(part.kind == "constant" for part in parts):
            return _constant(decide(part.run(()) for part in parts), node)
        runs = [self._use(part) for part in parts]
        # one after another, since what follows `x is None or` may have raised inside
        return Part("mixed", lambda answers: decide(run(answers) for run in runs), node)

    def _ifexp(self, node: ast.IfExp, bound: Mapping[str, Any]) -> Part:
        parts = [self._part(each, bound) for each in (node.test, node.body, node.orelse)]
        test, body, orelse = (self._use(part) for part in parts)
        return Part("mixed", lambda answers: body(answers) if test(answers) else orelse(answers), node)

    def _unaryop(self, node: ast.UnaryOp, bound: Mapping[str, Any]) -> Part:
        return self._of(node, [self._part(node.operand, bound)], UNARY[type(node.op)])

    def _binop(self, node: ast.BinOp, bound: Mapping[str, Any]) -> Part:
        left, right = self._part(node.left, bound), self._part(node.right, bound)
        if type(node.op) not in BINARY:
            raise Inside
        trusted = left.kind == right.kind == "constant"
        if (
            isinstance(node.op, ast.Mod)
            and not trusted
            and left.kind == "constant"
            and isinstance(left.run(()), str)
        ):
            raise Inside  # text with something in it
        return self._of(node, [left, right], lambda a, b: arithmetic(type(node.op), a, b, trusted))

    def _list(self, node: ast.List | ast.Tuple | ast.Set, bound: Mapping[str, Any]) -> Part:
        parts = [self._part(each, bound) for each in node.elts]
        starred = any(isinstance(each, ast.Starred) for each in node.elts)
        if starred or (parts and all(part.kind == "inside" for part in parts)):
            raise Inside
        kind: Callable[[Any], Any] = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return self._of(node, parts, lambda *entries: kind(entries))

    _tuple = _set = _list

    def _dict(self, node: ast.Dict, bound: Mapping[str, Any]) -> Part:
        if None in node.keys:
            raise Inside
        size = len(node.values)
        parts = [self._part(each, bound) for each in (*node.keys, *node.values) if each is not None]
        return self._of(node, parts, lambda *entries: dict(zip(entries[:size], entries[size:], strict=True)))

    def _call(self, node: ast.Call, bound: Mapping[str, Any]) -> Part:
        method = isinstance(node.func, ast.Attribute) and node.func.attr in TEXT_METHODS
        name = ast.unparse(node.func)
        if not self.functions or any(isinstance(each, ast.Starred) for each in node.args):
            raise Inside
        if any(keyword.arg is None for keyword in node.keywords) or name in self.known:
            raise Inside
        parts = [self._part(each, bound) for each in (*node.args, *(keyword.value for keyword in node.keywords))]
        constant = all(part.kind == "constant" for part in parts)
        if method and constant:
            assert isinstance(node.func, ast.Attribute)
            text = self._part(node.func.value, bound)
            value = text.run(()) if text.kind == "constant" else None
            function: Any = getattr(value, node.func.attr) if isinstance(value, str) else None
        else:
            function = CHECKS.get(name) or (BUILDERS.get(name) if constant else None)
        # a second argument, such as the digits of `round`, is the tests'
        if function is None or (name in ("round", "isinstance") and any(p.kind != "constant" for p in parts[1:])):
            raise Inside
        if name in ("all", "any") and parts[0].kind == "inside":
            raise Inside  # it may be a generator
        keys, number = [str(keyword.arg) for keyword in node.keywords], len(node.args)
        return self._of(
            node, parts, lambda *args: function(*args[:number], **dict(zip(keys, args[number:], strict=True)))
        )

    def _generatorexp(self, node: ast.GeneratorExp | ast.ListComp | ast.SetComp, bound: Mapping[str, Any]) -> Part:
        parts = [self._part(node.elt, names) for names in self._rounds(node.generators, bound)]
        if parts and all(part.kind == "inside" for part in parts):
            raise Inside
        kind: Callable[[Any], Any] = set if isinstance(node, ast.SetComp) else list
        return self._of(node, parts, lambda *entries: kind(entries))

    _listcomp = _setcomp = _generatorexp

    def _rounds(
        self, generators: Sequence[ast.comprehension], bound: Mapping[str, Any]
    ) -> Iterator[Mapping[str, Any]]:
        if not generators:
            yield bound
            return
        first, *others = generators
        for names in rounds(first.target, self._part(first.iter, bound)):
            conditions = [self._part(each, {**bound, **names}) for each in first.ifs]
            if any(part.kind != "constant" for part in conditions):
                raise Inside
            if all(part.run(()) for part in conditions):
                yield from self._rounds(others, {**bound, **names})


def constant_of(node: ast.expr, known: Mapping[str, Any]) -> Part | None:
    """The expression, if it is a constant."""
    question = Question.__new__(Question)
    question.known, question.functions, question._places, question.constants = known, True, [], False
    part = question._part(node, {})
    return part if part.kind == "constant" else None


def rounds(target: ast.expr, entries: Part) -> list[dict[str, Any]]:
    """What a loop's names stand for in each round; raises `Inside` where that is not known outside."""
    if entries.kind != "constant":
        raise Inside
    found = []
    for entry in entries.run(()):
        found.append(names_of(target, entry))
        if len(found) > MAX_ROUNDS:
            raise Inside
    return found


def names_of(target: ast.expr, value: Any) -> dict[str, Any]:
    """What the names of an assignment's target come to stand for; raises `Inside` for what are no plain names."""
    if isinstance(target, ast.Name):
        return {target.id: value}
    if not isinstance(target, ast.Tuple | ast.List) or not isinstance(value, Sequence):
        raise Inside
    if len(target.elts) != len(value):
        raise Inside
    return {n: v for each, entry in zip(target.elts, value, strict=True) for n, v in names_of(each, entry).items()}


def _value(answer: Answer) -> Any:
    if not answer[0]:
        raise Unanswered(answer[1])
    return answer[1]


def _nothing(answers: Answers) -> Any:
    raise AssertionError("the value of what is inside comes from there")


def _constant(value: Any, node: ast.expr) -> Part:
    fixed = list(value) if isinstance(value, zip | enumerate | reversed) else value
    return Part("constant", lambda _: fixed, node)


class _Filled(ast.NodeTransformer):
    """Puts values in the places of names."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return literal(self.names[node.id]) if node.id in self.names else node


def _with_places(node: Any, places: Mapping[int, int]) -> Any:
    """A copy of the expression, with `_0`, `_1`, … in the places of what is computed inside."""
    if isinstance(node, list):
        return [_with_places(each, places) for each in node]
    if not isinstance(node, ast.AST):
        return node
    if id(node) in places:
        return ast.Name(f"_{places[id(node)]}", ast.Load())
    return type(node)(**{name: _with_places(value, places) for name, value in ast.iter_fields(node)})
