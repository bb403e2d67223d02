r"""Mathematics as keyboards and Unicode write it (`sqrt(2)`, `x²`, `⅔`, `2pi`), spelled out in LaTeX."""

from __future__ import annotations

import re
import unicodedata

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—", "-"),
        **dict.fromkeys("∗⋅·×✕", "×"),
        **{"≦": "≤", "⩽": "≤", "≧": "≥", "⩾": "≥", "π": r"\pi ", "∞": r"\infty ", "θ": r"\theta ", "º": "°"},
        **{
            "〈": "⟨",
            "〉": "⟩",
            "'": "'",
            "′": "'",
            "…": r"\ldots ",
            "¢": r"\text{cent}",
            "\u200b": "",
            "\xa0": " ",
        },
    }
)
_ROOTS = {"√": "", "∛": "[3]", "∜": "[4]"}
_ROOT_SIGN = re.compile(r"([√∛∜])\s*(?:\(([^()]*)\)|([0-9]+|[A-Za-z]))?")
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "₀₁₂₃₄₅₆₇₈₉₊₋"
_SCRIPTS = re.compile(f"([{_RAISED}]+)|([{_LOWERED}]+)")
_PLAIN = str.maketrans(_RAISED + _LOWERED, "0123456789+-" * 2)
_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s?\(([^()]*)\)")
_POWER = re.compile(r"\^\s?(?:\(([^()]*)\)|-\s?([0-9]+|[A-Za-z]))")


def spell_out(text: str) -> str:
    """The text with LaTeX commands for characters and words that mean them."""
    if not text.isascii():
        text = _ROOT_SIGN.sub(_root, _SCRIPTS.sub(_script, text.translate(_CHARACTERS)))
        text = "".join(map(_plain, text)).replace("⁄", "/").translate(_CHARACTERS)
    if "pi" in text or "sqrt" in text:
        text = _PI.sub(r"\\pi ", _ROOT.sub(r"\\sqrt{\1}", text))
    return _POWER.sub(lambda match: f"^{{{match[1] or '-' + (match[2] or '')}}}", text) if "^" in text else text


def _root(match: re.Match[str]) -> str:
    return rf"\sqrt{_ROOTS[match[1]]}{{{match[2] or match[3]}}}" if match[2] or match[3] else r"\sqrt "


def _script(match: re.Match[str]) -> str:
    return ("^" if match[1] else "_") + "{" + match.group().translate(_PLAIN) + "}"


def _plain(symbol: str) -> str:
    """A character's compatible form: `３` is 3, `½` is a fraction."""
    if symbol.isascii():
        return symbol
    form = unicodedata.normalize("NFKC", symbol)
    over, slash, under = form.partition("⁄")
    return rf"\frac{{{over}}}{{{under}}}" if slash and over and under else form
