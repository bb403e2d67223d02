"""Config files: read, and merged by one rule, so that a small file can stand on top of a whole one."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from sppo_lightning.cli_names import settings_of
from sppo_lightning.errors import InputError, readable_path, shortened
from sppo_lightning.pipeline import Stage
from sppo_lightning.yaml_text import load, text_of

Config = Mapping[str, Any]

_JOINED = re.compile(r"(?:--config=|-c=?)(?P<name>.+)", re.DOTALL)  # the option and its value in one word
_BY_ITEM = (("trainer", "callbacks"), ("trainer", "logger"))  # every other list is replaced
_SHORT_NAMES = ("sppo_lightning.callbacks", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """The values of all `--config` (or `-c`) among the arguments, and the other arguments."""
    names, others = [], []
    words = iter(arguments)
    for word in words:
        value = next(words, None) if word in ("--config", "-c") else None
        joined = _JOINED.fullmatch(word)
        if value is not None:
            names.append(value)
        elif joined:
            names.append(joined["name"])
        else:
            others.append(word)
    return names, others


def read(name: str) -> Config:
    """The settings in a config file, or in `name` itself where it is YAML.

    A YAML file that is named in it, for a component that stands in a file of its own, is looked for beside it.

    Raises:
        InputError: For a file that is not there, is not YAML or holds no settings by name.
    """
    if "\n" in name or name.lstrip().startswith("{"):
        content, folder = load(name, textwrap.shorten(name, 60, placeholder="…")), Path()
    elif (path := readable_path(name, "--config")).is_file():
        content, folder = load(text_of(path), name), path.parent
    elif path.is_dir():
        raise InputError(f"`--config`={name} is a folder; name a YAML file in it.")
    else:
        there = [str(file) for file in sorted(path.parent.glob("*.y*ml"))]
        close = difflib.get_close_matches(str(path), there, n=1)
        way_out = f"the nearest is {close[0]}" if close else "check its path"
        raise InputError(f"`--config`={name} does not exist; {way_out}.")
    if not isinstance(content, Mapping):
        raise InputError(
            f"`--config`={name} holds no settings by name; write `model:`, `data:` and `trainer:` with theirs."
        )
    return _with_paths_from(folder, content)


def merge(configs: Iterable[Config]) -> Config:
    """One config of several, of which later ones win.

    Mappings are merged key by key. A component (a mapping with `class_path`) replaces one of another class as a
    whole. The lists `trainer.callbacks` and `trainer.logger` are merged item by item: an item goes into the one of
    the same class (and the same `init_args.name`, where both have one), which keeps its place; otherwise it is
    added at the end, or behind the last pipeline stage if it is a stage itself. Every other value is replaced,
    by null too.
    """
    merged: Config = {}
    for config in configs:
        merged = _merged(merged, config, ())
    return merged


def as_text(config: Config) -> str:
    """YAML in which each value has its type written down, so that no other reader takes text for a number."""
    return yaml.safe_dump(config, default_style='"', allow_unicode=True, sort_keys=False)


def check_components(node: Any, place: str = "") -> None:
    """Raise `InputError` for a component whose `class_path` is no name or whose `init_args` hold none."""
    if isinstance(node, list):
        for item in node:
            check_components(item, place)
    elif isinstance(node, Mapping):
        where = f" (in `{place}`)" if place else ""
        class_path, settings = node.get("class_path", "it"), node.get("init_args", {})
        if not (isinstance(class_path, str) and re.fullmatch(r"\w+(\.\w+)*", class_path)):
            raise InputError(
                f"`class_path`={shortened(repr(class_path))}{where} is no dotted name of a class; correct it."
            )
        if not isinstance(settings, Mapping):
            raise InputError(
                f"`init_args`={shortened(settings)} of {class_path}{where} must hold settings by name; leave it "
                "out where there are none."
            )
        for key, value in node.items():
            inner = place if key == "init_args" else f"{place}.{key}" if place else f"{key}"
            check_components(value, inner)


def with_unknown_as_null(node: Any, known: Collection[str] | None = None) -> Any:
    """The config with null for each empty mapping that is no setting, which the parser would pass over.

    `known` are the settings that `node` may have, dotted for those of a group; None where anything goes.

    Raises:
        InputError: For a group of settings that holds none, which the parser would find out too late.
    """
    if isinstance(node, list):
        return [with_unknown_as_null(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "class_path" in node:
        settings = node.get("init_args")
        if not isinstance(settings, Mapping):
            return node
        return {**node, "init_args": with_unknown_as_null(settings, _settings_of(node))}
    visible = {}
    for key, value in node.items():
        inner = [name.removeprefix(f"{key}.") for name in known or () if name.startswith(f"{key}.")]
        if inner and not isinstance(value, Mapping | str):  # text is the name of a file with them
            raise InputError(f"`{key}`={shortened(value)} must hold settings by name, such as `{inner[0]}`.")
        unknown = known is not None and key not in known and not inner
        visible[key] = None if value == {} and unknown else with_unknown_as_null(value, inner or None)
    return visible


def _settings_of(component: Config) -> list[str] | None:
    try:
        return settings_of(component["class_path"])
    except Exception:  # no such class: which the parser will say
        return None


def _with_paths_from(folder: Path, node: Any) -> Any:
    """`node`, with the names of YAML files that lie in its own folder readable from the current one."""
    if isinstance(node, Mapping):
        return {key: _with_paths_from(folder, value) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_paths_from(folder, value) for value in node]
    return str(folder / node) if _is_yaml(node) and (folder / node).is_file() else node


def _is_yaml(value: Any) -> bool:
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def _merged(earlier: Any, later: Any, place: tuple[str, ...]) -> Any:
    if later is None:
        return None
    if _is_yaml(earlier) and Path(earlier).is_file():  # a component from a file of its own
        earlier = _with_paths_from(Path(earlier).parent, load(text_of(Path(earlier)), earlier))
    if place in _BY_ITEM and any(isinstance(side, list) for side in (earlier, later)):
        before, after = _items(earlier), _items(later)
        return later if before is None or after is None else _merged_items(before, after)
    if not (isinstance(earlier, Mapping) and isinstance(later, Mapping)):
        return later
    if {"class_path"} <= earlier.keys() & later.keys() and not _same_class(earlier, later):
        return later
    return {**earlier, **{key: _merged(earlier.get(key), value, (*place, key)) for key, value in later.items()}}


def _items(value: Any) -> list[Any] | None:
    """The value as a list of components; None for a value that is none, such as true."""
    items = value if isinstance(value, list) else [value] if isinstance(value, str | Mapping) else None
    return items and [{"class_path": i} if isinstance(i, str) and not _is_yaml(i) else i for i in items]


def _merged_items(earlier: Sequence[Any], later: Sequence[Any]) -> list[Any]:
    entries = [(item, True) for item in earlier]  # with whether another item may still go into it
    for item in later:
        same = [i for i, (other, free) in enumerate(entries) if free and _is_the_same(other, item)]
        if same:
            i = max(same, key=lambda i: _name(entries[i][0]) == _name(item))  # the first of the best
            entries[i] = (_merged(entries[i][0], item, ()), False)
            continue
        stages = [i for i, (other, _) in enumerate(entries) if _is_stage(other)] if _is_stage(item) else []
        entries.insert(stages[-1] + 1 if stages else len(entries), (item, False))
    return [item for item, _ in entries]


def _is_the_same(one: Any, other: Any) -> bool:
    if not all(isinstance(item, Mapping) and "class_path" in item for item in (one, other)):
        return False
    names = {_name(one), _name(other)} - {None}
    return _same_class(one, other) and len(names) < 2


def _name(item: Config) -> Any:
    init_args = item.get("init_args")
    return init_args.get("name") if isinstance(init_args, Mapping) else None


def _same_class(one: Config, other: Config) -> bool:
    if one["class_path"] == other["class_path"]:
        return True
    found = _class_of(one)
    return found is not None and found is _class_of(other)


def _is_stage(item: Any) -> bool:
    found = _class_of(item) if isinstance(item, Mapping) else None
    return isinstance(found, type) and issubclass(found, Stage)


def _class_of(item: Config) -> Any:
    """What the item's `class_path` names; None where that cannot be imported, which the parser will say."""
    path = str(item.get("class_path"))
    module, _, name = path.rpartition(".")
    for package in [module] if module else _SHORT_NAMES:
        try:
            found = getattr(import_module(package), name, None)
        except Exception:  # whatever the user's own module raises
            found = None
        if found is not None:
            return found
    return None
