"""Tests made of `assert` statements, taken apart into what the sandbox is asked and what is expected of it.

The statements are followed here as far as they are plain: constants that get names, loops over constants, calls of
functions that hold the asserts (`check(add)`). What else there is, such as an object that is set up, runs inside.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sppo_lightning.verification.expressions import Question, constant_of, names_of, rounds
from sppo_lightning.verification.operations import Inside, literal, mutable

Judge = Callable[[Any], bool]
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LEAVE = (ast.Return, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom, ast.Global, ast.Nonlocal)
_MAX_CALLS = 20  # one within another


def take_apart(code: str) -> tuple[list[dict[str, Any]], list[Judge]]:
    """A case and its judge for each assert, or for each statement that holds asserts and is followed no further.

    A case is the steps since the one before: `["do", statements]`, and `["ask", expressions, whole]` for the
    values of expressions, where `whole` is what to compute of them inside if all are objects of one class that
    cannot come out. A judge takes the answers to what is asked, in order: one `(could be computed, value or error)`
    for each expression, or a bool for `whole`.

    Raises:
        ValueError: For what cannot be parsed.
    """
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"`code` of the tests cannot be parsed: {error}") from error
    tests = _Tests()
    tests.follow(body)
    if not tests.cases:  # functions that a test runner would have called
        for name in list(tests.helpers):
            if not _parameters(tests.helpers[name]):
                tests.follow(ast.parse(f"{name}()").body)
    return tests.cases, tests.judges


class _Tests:
    """What has been found so far."""

    def __init__(self) -> None:
        self.cases: list[dict[str, Any]] = []
        self.judges: list[Judge] = []
        self.steps: list[list[Any]] = []  # since the last case
        self.questions: list[Judge] = []  # of the case at hand
        self.known: dict[str, Any] = {"__name__": "__main__"}  # constants by name
        self.told: set[str] = {"__name__"}  # names of constants that are known inside as well
        self.helpers: dict[str, ast.FunctionDef] = {}  # functions that hold asserts
        self.asserting: set[str] = set()  # their names, told or not
        self.depth, self.calls = 0, 0  # of loops, of calls

    def follow(self, body: Sequence[ast.stmt]) -> None:
        """Go through statements one by one."""
        for statement in body:
            if isinstance(statement, ast.Assert):
                self._assert(statement.test)
            elif isinstance(statement, ast.FunctionDef) and self._asserts(statement):
                self.helpers[statement.name] = statement  # not told, since what is expected stands in it
                self.asserting.add(statement.name)
            elif not (self._try(self._let, statement) or self._try(self._follow_into, statement)):
                self._inside(statement)

    def _try(self, step: Callable[[ast.stmt], bool], statement: ast.stmt) -> bool:
        """Whether the step could be done; where not, nothing has changed."""
        before = {name: value.copy() if hasattr(value, "copy") else value for name, value in vars(self).items()}
        try:
            if step(statement):
                return True
        except Inside:
            pass
        vars(self).update(before)
        return False

    def _let(self, statement: ast.stmt) -> bool:
        """A constant gets a name."""
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return False
        part = constant_of(statement.value, self.known)
        if part is None:
            return False
        for name, value in names_of(statement.targets[0], part.run(())).items():
            literal(value)
            self.known[name] = value
            self.told.discard(name)
        return True

    def _follow_into(self, statement: ast.stmt) -> bool:
        """A loop over constants, a decision on constants, or a call of a function that holds asserts."""
        if isinstance(statement, ast.If) and self._asserts(statement):
            return self._decide(statement)
        if (
            isinstance(statement, ast.For)
            and self._asserts(statement)
            and not (statement.orelse or _leaves(statement))
        ):
            part = constant_of(statement.iter, self.known)
            if part is None:
                return False
            self.depth += 1
            for names in rounds(statement.target, part):
                self._bind(names)
                self.follow(statement.body)
            self.depth -= 1
            self._close()
            return True
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return False
        helper = self.helpers.get(call.func.id)
        if helper is None or call.keywords or _leaves(helper) or self.calls >= _MAX_CALLS:
            return False
        parameters = _parameters(helper)
        if parameters is None or len(parameters) != len(call.args):
            return False
        self.calls += 1
        for name, value in zip(parameters, call.args, strict=True):
            self.follow([ast.fix_missing_locations(ast.Assign([ast.Name(name, ast.Store())], value, lineno=0))])
        self.follow(helper.body)
        self.calls -= 1
        return True

    def _decide(self, statement: ast.If) -> bool:
        part = constant_of(statement.test, self.known)
        if part is not None:
            self.follow(statement.body if part.run(()) else statement.orelse)
            return True
        branches = []
        for body in (statement.body, statement.orelse):
            tests = [each.test for each in body if isinstance(each, ast.Assert)]
            if len(tests) < len(body):
                return False
            branches.append(ast.BoolOp(ast.And(), [ast.Constant(True), *tests]))
        self._assert(ast.IfExp(statement.test, *branches))
        return True

    def _asserts(self, statement: ast.stmt) -> bool:
        """Whether it holds asserts, or calls a function that does."""
        return any(
            isinstance(node, ast.Assert)
            or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.asserting)
            for node in ast.walk(statement)
        )

    def _bind(self, names: Mapping[str, Any]) -> None:
        for name, value in names.items():
            literal(value)
            self.known[name] = value
            self.told.discard(name)

    def _assert(self, test: ast.expr) -> None:
        question = self._question(test)
        if question.inside:
            self.steps.append(["ask", [ast.unparse(node) for node in question.inside], question.whole])
            self.questions.append(
                # whether the whole holds is the sandbox's to say only where it was asked for it
                lambda answer: answer if question.whole and isinstance(answer, bool) else question.holds(answer)
            )
        elif not question.holds(()):
            self.steps.append(["ask", [], None])
            self.questions.append(lambda answer: False)
        if not self.depth:
            self._close()

    def _question(self, test: ast.expr) -> Question:
        while True:
            question = Question(test, self.known)
            if not question.inside and any(isinstance(node, ast.Call) for node in ast.walk(test)):
                question = Question(test, self.known, functions=False)  # the submission's `sum`, not Python's
            constants = len(self.known)
            for node in question.inside:
                self._tell(node)
            if len(self.known) == constants:
                return question

    def _close(self) -> None:
        """Make a case of what has been asked; an assert on constants alone asks nothing."""
        if not self.depth and self.questions:
            judges, self.questions = self.questions, []
            self.judges.append(
                lambda answers: (
                    len(answers) == len(judges) and all(judge(a) for judge, a in zip(judges, answers, strict=True))
                )
            )
            self.cases.append({"steps": self.steps})
            self.steps = []

    def _inside(self, statement: ast.stmt) -> None:
        """A statement that runs in the sandbox; with asserts in it, having run is what makes it right."""
        self._tell(statement)
        self._do(statement)
        for name in _bound(statement):
            self.known.pop(name, None)
            self.helpers.pop(name, None)
            self.asserting.discard(name)
        if self._asserts(statement) and not isinstance(statement, _DEFINITIONS):
            self.steps.append(["ask", [], None])
            self.questions.append(lambda answer: True)
            self._close()

    def _tell(self, node: ast.AST) -> None:
        """Let the sandbox know the constants that it needs; what it could change is no constant from there on."""
        for name in sorted({each.id for each in ast.walk(node) if isinstance(each, ast.Name)}):
            if name in self.helpers:
                helper = self.helpers.pop(name)
                self._tell(helper)
                self._do(helper)
            elif name in self.known and name not in self.told:
                value = self.known[name]
                self._do(ast.Assign([ast.Name(name, ast.Store())], literal(value), lineno=0))
                self.told.add(name)
                if mutable(value):
                    del self.known[name]

    def _do(self, statement: ast.stmt) -> None:
        source = ast.unparse(ast.fix_missing_locations(statement))
        if self.steps and self.steps[-1][0] == "do":
            self.steps[-1] = ["do", f"{self.steps[-1][1]}\n{source}"]
        else:
            self.steps.append(["do", source])


def _leaves(statement: ast.stmt) -> bool:
    """Whether it can be left in its middle, or changes names elsewhere, so that it is no plain sequence."""
    return any(isinstance(node, _LEAVE) for node in ast.walk(statement))


def _parameters(function: ast.FunctionDef) -> list[str] | None:
    """Names of the parameters, where they are plain ones."""
    given = function.args
    if given.vararg or given.kwarg or given.kwonlyargs or given.defaults or function.decorator_list:
        return None
    return [each.arg for each in (*given.posonlyargs, *given.args)]


def _bound(statement: ast.stmt) -> set[str]:
    """Names that the statement gives a meaning."""
    found = {
        node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(statement):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, _DEFINITIONS):
            found.add(node.name)
    return found
