"""What jsonargparse says about a config it cannot use, told in one sentence with the nearest valid name."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ArgumentParser

from sppo_lightning.cli_names import nearest_class, nearest_setting, options_of, settings_of
from sppo_lightning.errors import shortened

_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_TYPES |= {"dict": "a mapping", "list": "a list", "tuple": "a list"}


@dataclass
class _Scope:
    """What an indented part of the message is about."""

    column: int
    kind: str  # "key", "class" or "union"
    text: str
    value: str | None = None  # of a union, what was given


@dataclass
class _Problem:
    """One line of the message that says what is wrong."""

    text: str
    column: int
    scopes: list[_Scope] = field(default_factory=list)
    value: str | None = None

    @property
    def union(self) -> _Scope | None:
        """The innermost choice of types that the line belongs to, if nothing lies between."""
        return self.scopes[-1] if self.scopes and self.scopes[-1].kind == "union" else None

    @property
    def path(self) -> tuple[str, str, str]:
        """Where it is: the setting within its class, the class ("" at the top), and where that class stands."""
        scopes = [scope for scope in self.scopes if scope.kind != "union"]
        last = max((i for i, scope in enumerate(scopes) if scope.kind == "class"), default=-1)
        inner = ".".join(scope.text for scope in scopes[last + 1 :])
        outer = ".".join(scope.text for scope in scopes[: max(last, 0)] if scope.kind == "key")
        return inner, scopes[last].text if last >= 0 else "", outer


_SCOPES = {
    "key": re.compile(r'Parser key "(?P<text>.+)":$'),
    "class": re.compile(r"Problem with given class_path '(?P<text>.+)':$"),
    "union": re.compile(r"(?P<text>Does not validate against any of the Union subtypes)$"),
}
_MISMATCH = re.compile(r"(?P<text>Expected an? .+?|Not a valid subclass of \w+)(?:\. Got value: (?P<value>.*))?$")
_NOISE = re.compile(r"Subtypes: |Errors:$|Given value type: |Subclass types expect|an? (class path|dict with)")


def sentence(message: str, parser: ArgumentParser) -> str:
    """One sentence for jsonargparse's `message`: what cannot be used, and the nearest that can."""
    problems = _read(message)
    telling = [problem for problem in problems if not _MISMATCH.match(problem.text) or _is_class_path(problem)]
    if telling:
        return _tell(max(telling, key=lambda problem: problem.column), parser)
    if problems:
        deepest = max(problems, key=lambda problem: problem.column)
        same = [
            p for p in problems if p.union is not None and p.union is deepest.union and p.value == deepest.value
        ]
        return _mismatch(deepest, same or [deepest])
    return " ".join(message.split())


def _read(message: str) -> list[_Problem]:
    """The lines of `message` that say what is wrong, each with what it is about."""
    scopes: list[_Scope] = []
    problems: list[_Problem] = []
    for number, line in enumerate(message.split("\n")):
        text = line.lstrip(" -")
        column = len(line) - len(text)
        if number and not column:  # the second line of a value
            continue
        if text.startswith("Given value: ") and (union := [s for s in scopes if s.column == column]):
            union[-1].value = text.removeprefix("Given value: ")
            continue
        scopes = [scope for scope in scopes if scope.column < column or _NOISE.match(text)]
        kind = next((kind for kind, pattern in _SCOPES.items() if pattern.match(text)), None)
        if kind is not None:
            scopes.append(_Scope(column, kind, _SCOPES[kind].match(text)["text"]))  # type: ignore[index]
        elif text and not _NOISE.match(text):
            mismatch = _MISMATCH.match(text)
            problems.append(_Problem(text, column, list(scopes), mismatch["value"] if mismatch else None))
    return problems


def _is_class_path(problem: _Problem) -> bool:
    """Whether a mismatch is about the class that a path names, and not about a value."""
    return problem.text.startswith(("Expected a dot import path", "Expected an instantiatable class"))


def _tell(problem: _Problem, parser: ArgumentParser) -> str:
    """The sentence for a problem that names its own cause."""
    text = problem.text
    for pattern, tell in _TELLERS:
        if match := re.match(pattern, text):
            return tell(problem, parser, *match.groups())
    return f"{text[:1].upper()}{text[1:].rstrip('.')}{_in(_place(problem))}."


def _unknown_key(problem: _Problem, parser: ArgumentParser, group: str | None, key: str) -> str:
    _, class_path, outer = problem.path
    if key == "class_path":  # with other keys beside it, all are taken for settings of the base class
        return f"`{outer}` has settings beside a `class_path`; a component's settings go under `init_args`."
    known = settings_of(class_path) if class_path else options_of(parser)
    if group is not None:
        known = [name.removeprefix(f"{group}.") for name in known if name.startswith(f"{group}.")]
        owner = f"`{group}` of {class_path}"
    else:
        known = [name for name in known if "." not in name]
        owner = class_path
    return f"`{key}` is not a setting of {owner}{_in(outer)}; {nearest_setting(key, known)}."


def _unknown_option(problem: _Problem, parser: ArgumentParser, key: str) -> str:
    known = options_of(parser)
    head, _, last = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == head]
    return f"`{key}` is not a setting of {parser.prog.split()[-1]}; {nearest_setting(key, siblings or known)}."


def _unrecognized(problem: _Problem, parser: ArgumentParser, arguments: str) -> str:
    words = arguments.split()
    flag = next((word for word in words if word.startswith("--")), None)
    if flag is None:
        return f"`{words[0]}` is no argument that is understood; give settings as `--name=value`."
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    name = flag.partition("=")[0]
    return f"`{name}` is not an argument of {parser.prog.split()[-1]}; {nearest_setting(name, known, few=0)}."


def _bad_class_path(problem: _Problem, parser: ArgumentParser, name: str | None = None) -> str:
    """For a class path whose module or class is not there; its own imports failing is another matter."""
    _, class_path, outer = problem.path
    class_path = name or class_path
    missing = re.match(r"No module named '(.+)'$", problem.text)
    if missing and not f"{class_path}.".startswith(f"{missing[1]}."):
        return f"`{class_path}`{_in(outer)} cannot be imported, because there is no module named '{missing[1]}'."
    near = nearest_class(class_path, None)
    way_out = f"the nearest is {near}" if near else "check its module and name"
    where = _in(outer if name is None else _place(problem))
    return f"`class_path`={class_path}{where} does not exist; {way_out}."


def _not_a_subclass(problem: _Problem, parser: ArgumentParser, class_path: str, base: str) -> str:
    near = nearest_class(class_path, base)
    way_out = f"use one such as {near}" if near else "use one that is"
    return f"`class_path`={class_path} is not a {base}, which `{_place(problem)}` takes; {way_out}."


def _another_class(problem: _Problem, parser: ArgumentParser, only: str, class_path: str) -> str:
    return f"`class_path`={class_path} is not {only}, which alone `{_place(problem)}` takes; leave it out."


def _abstract(problem: _Problem, parser: ArgumentParser, class_path: str) -> str:
    near = nearest_class(class_path, class_path.rpartition(".")[2])
    way_out = f"use one of its subclasses, such as {near}" if near else "use one of its subclasses"
    return f"`class_path`={class_path} in `{_place(problem)}` is a base class alone; {way_out}."


def _required(problem: _Problem, parser: ArgumentParser, names: str) -> str:
    _, class_path, outer = problem.path
    wanted = [
        f"`{name.partition('.')[2] or name}`" if not class_path else f"`{name}`" for name in names.split(", ")
    ]
    several = len(wanted) > 1
    if class_path:
        what = f"{class_path}{_in(outer)} needs {' and '.join(wanted)}"
        return f"{what}, which {'are' if several else 'is'} not set; add {'them' if several else 'it'}."
    config = {"`data`", "`model`"} & {*wanted}
    way_out = "name a config with `--config`" if config else "see --help for what there is"
    return f"{' and '.join(wanted)} {'are' if several else 'is'} not set; {way_out}."


def _no_command(problem: _Problem, parser: ArgumentParser, commands: str) -> str:
    return f"Say which of {commands.replace(',', ', ')} to run, as in `python -m sppo_lightning fit --config …`."


def _bad_command(problem: _Problem, parser: ArgumentParser, command: str, commands: str) -> str:
    return f"`{command}` is not a command; {nearest_setting(command, re.findall(r'[a-z]+', commands))}."


def _no_mapping(problem: _Problem, parser: ArgumentParser, key: str, value: str) -> str:
    return f"`{key}`={shortened(value)} must hold settings by name."


def _no_text(problem: _Problem, parser: ArgumentParser, what: str, value: str) -> str:
    return f"`{_place(problem)}`: a {what} must be text, and {value} is none."


_TELLERS: list[tuple[str, Any]] = [
    (r"(?:Group '(.+)' does not accept option|Option) '(.+?)'(?: is not accepted)?$", _unknown_key),
    (r"Subcommand '.+' does not accept option '(.+)'$", _unknown_option),
    (r"unrecognized arguments: (.+)$", _unrecognized),
    (r"(?:No module named|module '.+' has no attribute) ", _bad_class_path),
    (r"(?:Expected a dot import path string|Unexpected import path format): (.*)$", _bad_class_path),
    (r'Parser key "(.+)": Unable to load config "(.*)"', _no_mapping),
    (r"Not of type (Path): expected str, .*not (\w+)$", _no_text),
    (r"Import path (\S+) does not correspond to a subclass of (\w+)$", _not_a_subclass),
    (r"Subclasses are disabled for (\w+), thus '(.+?)'", _another_class),
    (r"Expected an instantiatable class, but (\S+) is abstract$", _abstract),
    (r"the following arguments are required: (.+)$", _required),
    (r'expected "subcommand" to be one of \{(.+)\}', _no_command),
    (r"argument subcommand: invalid choice: '(.+?)' \(choose from (.+)\)$", _bad_command),
]


def _mismatch(deepest: _Problem, alternatives: Sequence[_Problem]) -> str:
    """The sentence for a value of the wrong type, with what it may be instead."""
    value = deepest.value or (deepest.union.value if deepest.union else None)
    beside = _beside_class_path(value)
    if beside:
        near = difflib.get_close_matches(beside, ["class_path", "init_args"], n=1)
        way_out = f"the nearest is `{near[0]}`" if near else "a component's settings go under `init_args`"
        return f"`{_place(deepest)}` has `{beside}` beside its `class_path`; {way_out}."
    wanted = list(dict.fromkeys(_type_in_words(problem.text) for problem in alternatives))
    allowed = f"{', '.join(wanted[:-1])} or {wanted[-1]}" if len(wanted) > 1 else wanted[0]
    name, class_path, outer = deepest.path
    owner = f" of {class_path}{_in(outer)}" if class_path else ""
    choices = re.search(r"Literal\[(.+)\]", " ".join(problem.text for problem in alternatives))
    near = difflib.get_close_matches(str(value), re.findall(r"'(.+?)'", choices[1]), n=1) if choices else []
    hint = f"; the nearest is {near[0]}" if near else ""
    return f"`{name}`={shortened(value)}{owner} must be {allowed}{hint}."


def _beside_class_path(value: str | None) -> str | None:
    """The key that stands beside `class_path` and `init_args` in a component, if there is one."""
    try:
        given = ast.literal_eval(value or "")
    except (ValueError, SyntaxError):
        return None
    if not isinstance(given, dict) or "class_path" not in given:
        return None
    return next((key for key in given if key not in ("class_path", "init_args", "dict_kwargs")), None)


def _type_in_words(text: str) -> str:
    if match := re.match(r"Not a valid subclass of (\w+)", text):
        return f"the `class_path` (and `init_args`) of a {match[1]}"
    if match := re.search(r"Literal\[(.+)\]", text):
        return f"one of {match[1]}".replace("'", "")
    wanted = text.removeprefix("Expected ").split(". Got value")[0]
    match = re.match(r"an? <class '(?:.+\.)?(.+)'>", wanted)
    return _TYPES.get(match[1], match[1]) if match else wanted


def _place(problem: _Problem) -> str:
    """Where a component stands, as in model.critic; a component of a list by its list alone."""
    inner, _, outer = problem.path
    return ".".join(part for part in (outer, inner) if part)


def _in(outer: str) -> str:
    return f" (in `{outer}`)" if outer else ""
