"""Settings that must stay secret: masked in every config that is printed or saved, and in error messages."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import Namespace

MASK = "***"
_WORDS = (
    r"(?:api|access|private|secret|signing)_?key|pass(?:word|wd|phrase)|secrets?|credentials?|authorization|cookies?|"
    r"(?:auth|access|api|bearer|hf|hub|id|refresh|session)_token"
)
_NAME = re.compile(rf"(?:.*_)?(?:{_WORDS})|token", re.IGNORECASE)
_IN_TEXT = re.compile(rf"((?:\b|_)(?:{_WORDS})\b['\"`]?\s*[:=]\s*)(?:'[^']*'|\"[^\"]*\"|[^\s,;}}]+)", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]+@")  # user:password@


def masked(node: Any, name: str = "") -> Any:
    """`node` of a config with `***` for the text of each setting that is named as secrets are, and in addresses.

    Names such as `api_key`, `hf_token`, `password` or `Authorization` are those of secrets, at any depth.

    Args:
        node: Settings by name, a list of them, or one value.
        name: How the setting is called whose value this is.
    """
    if isinstance(node, Namespace):
        return Namespace(**{key: masked(value, key) for key, value in vars(node).items()})
    if isinstance(node, dict):
        return {key: masked(value, str(key)) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(masked(value, name) for value in node)
    if not isinstance(node, str):
        return node
    return MASK if node and _NAME.fullmatch(name.replace("-", "_")) else _IN_URL.sub(rf"\1:{MASK}@", node)


def masked_text(text: str) -> str:
    """`text`, such as a message that quotes settings, with `***` for what is behind the names of secrets."""
    return _IN_URL.sub(rf"\1:{MASK}@", _IN_TEXT.sub(rf"\1{MASK}", text))
