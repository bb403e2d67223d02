"""YAML as text: read as the parser reads it, and refused where it repeats, grows or nests beyond sense."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from sppo_lightning.errors import InputError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the parser's own
_DEEPEST = 64  # levels; libyaml crashes the process long before memory ends
_MOST = 100_000  # values, with those that `*names` stand for


def text_of(path: Path) -> str:
    """The file's text; raises `InputError` where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"`--config`={path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"`--config`={path} is not valid YAML: {error}.") from error


def load(text: str, name: str) -> Any:
    """What the YAML says, with numbers as the parser has them; `name` is what an error calls it.

    Raises:
        InputError: For text that is no YAML, for a key that stands twice in one mapping, of which the second would
            win, and for values that nest or multiply beyond what a config can mean.
    """
    try:
        _check_depth(text, name)
        _check_nodes(yaml.compose(text, Loader=_Loader), name)
        content = get_loader("yaml")(text)  # the parser's own, to which 1e-3 is a number
        # it hands a mapping of nothing but nulls back as text
        return yaml.safe_load(text) if isinstance(content, str) else content
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(_invalid(name, getattr(error, "problem_mark", None), reason)) from error
    except (ArithmeticError, ValueError) as error:  # a number or date of the right form that is none
        if isinstance(error, InputError):
            raise
        reason = textwrap.shorten(str(error), 80, placeholder="…")
        raise InputError(_invalid(name, None, reason)) from error


def _check_depth(text: str, name: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise InputError(_invalid(name, event.start_mark, f"more than {_DEEPEST} levels of nesting"))


def _check_nodes(root: yaml.Node | None, name: str) -> None:
    """Refuse repeated keys, values that hold themselves, and aliases of aliases that stand for too many values."""
    sizes: dict[int, int] = {}  # of each node with all that it stands for; 0 while it is counted

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            _check_keys(node, name)
            sizes[id(node)] = 1 + sum(map(size, _inside(node)))
        if not 0 < sizes[id(node)] <= _MOST:
            what = f"stands for more than {_MOST} values" if sizes[id(node)] else "holds itself"
            raise InputError(_invalid(name, node.start_mark, f"this value {what}"))
        return sizes[id(node)]

    if root is not None:
        size(root)


def _inside(node: yaml.Node) -> Iterator[yaml.Node]:
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from item if isinstance(item, tuple) else (item,)


def _check_keys(node: yaml.Node, name: str) -> None:
    keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    first: dict[str, yaml.Node] = {}
    for key in keys:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        other = first.setdefault(key.value, key)
        if other is not key:
            line = other.start_mark.line + 1
            raise InputError(
                f"`--config`={name} sets `{key.value}` in line {line} and again in line "
                f"{key.start_mark.line + 1}; remove one of them."
            )


def _invalid(name: str, mark: Any, reason: str) -> str:
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"`--config`={name} is not valid YAML{place}: {reason}."
