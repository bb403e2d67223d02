"""What a computer algebra system must not see, told from the text alone; and golds that nothing can equal."""

from __future__ import annotations

import re
from functools import lru_cache

from sppo_lightning.verification.extraction import MAX_ANSWER_CHARS
from sppo_lightning.verification.notation import Malformed, normalize

_COSTLY = re.compile(
    r"[0-9]{100}"  # huge numbers
    r"|\^\{?[+-]?[0-9]{6}|××"  # huge exponents; Python's power is no LaTeX
    r"|[0-9]{4}\s*!|!\s*!"  # huge and repeated factorials
    r"|(?<!_)[0-9] [0-9]"  # two numbers side by side are neither one nor a product
    r"|[0-9)]_|(?<![A-Za-z])[A-Za-z]\^\{-1\}\(|∓"  # digits with an index; an inverse function, or 1 over it
    r"|°[0-9A-Za-z{\\]"  # degrees and what follows them
    r"|__|[\"`@#&?]|==|!="  # code
)
_TOWER = re.compile(r"\^[\s{(+-]*([0-9]+)[\s})]*\^[\s{(+-]*([0-9]*)")
_SMALL_FACTORIAL = re.compile(r"\((?:[0-9]{1,3}|[a-z]|[+×-]){1,9}\)!")
_MAX_DEPTH = 16
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_COMMAND_NAMES = """
frac sqrt binom div pi theta alpha beta gamma delta epsilon varepsilon lambda mu sigma phi varphi omega rho tau
zeta eta kappa nu xi chi psi Omega Delta Gamma Lambda Sigma Phi Psi Theta infty sin cos tan cot sec csc arcsin
arccos arctan sinh cosh tanh log ln lg exp lfloor rfloor lceil rceil overline bar vec hat gcd max min sum prod int
lim to begin end setminus
"""
_COMMANDS = frozenset(_COMMAND_NAMES.split())


def is_refused(answer: str, gold: str) -> bool:
    """Whether canonical text is costly, approximate or no mathematics, and not what the gold answer is made of."""
    if len(answer) > MAX_ANSWER_CHARS or depth(answer) > _MAX_DEPTH or _COSTLY.search(answer):
        return True
    towers = _TOWER.findall(answer)
    if len(towers) > 1 or any(len(a + b) > 3 or not b or int(a) ** int(b) > 9999 for a, b in towers):
        return True
    if re.search(r"\)\s*!", _SMALL_FACTORIAL.sub("", answer)) and "!" not in gold:
        return True
    if any((sign in answer) != (sign in gold) for sign in "≈:") or r"\ldots" in answer or "'" in answer + gold:
        return True
    known = _COMMANDS.union(_COMMAND.findall(gold))
    return any(command not in known for command in _COMMAND.findall(answer))


def depth(text: str) -> int:
    """The deepest nesting of brackets; 0 where nothing nests."""
    now = deepest = 0
    for symbol in text:
        if symbol in "{([":
            now += 1
            deepest = max(deepest, now)
        elif symbol in "])}":
            now -= 1
    return deepest


_FUNCTIONS = (
    r"(?:sin|cos|tan|cot|sec|csc|ln|lim|max|min|gcd|mathbb|overline|vec|hat|bar"
    r"|equiv|pmod|left|right|text|begin|end)"
)
_DANGLING = re.compile(
    r"(?:[-+×=^_/<>≤≥≠≈±∪∩∈∖(\[{⟨⦃]|[_^]\{\}"
    rf"|\\(?:{_FUNCTIONS}|(?:log|sum|int|prod)(?:[_^]\{{[^{{}}]*\}})*)|\\)$"
)
_LAST_COMMAND = re.compile(r"\\([A-Za-z]+)$")
_CUT = re.compile(r"(?:f|fr|fra|s|sq|sqr|ci|cir|p|te|tex|inf|inft|infi|th|thet|bin|bino|mathb|mathr|ri|rig|righ)")


@lru_cache(maxsize=4096)
def why_ill_formed(gold: str) -> str | None:
    """Why a gold answer cannot be compared with anything, or `None` where it can."""
    if len(gold.strip()) > MAX_ANSWER_CHARS:
        return f"the gold answer is longer than {MAX_ANSWER_CHARS} characters"
    try:
        text = normalize(gold)
    except Malformed as error:
        return f"the gold answer {gold!r} cannot be read: {error}"
    if not text or text in ("$", r"\boxed", r"\fbox"):
        return "the gold answer is empty" if not gold.strip() else f"the gold answer {gold!r} holds nothing"
    if not re.search(r"[0-9A-Za-z∅]", text):
        return f"the gold answer {gold!r} says nothing"
    if not _is_balanced(text):
        return f"the brackets of the gold answer {gold!r} do not match"
    last = _LAST_COMMAND.search(text)
    is_cut = last is not None and _CUT.fullmatch(last[1]) is not None
    if is_cut or _DANGLING.search(text) or text.count(r"\begin{") != text.count(r"\end{"):
        return f"the gold answer {gold!r} breaks off"
    return None


def _is_balanced(text: str) -> bool:
    """Whether braces and bars match, and as many other brackets open as close: an interval may be half open."""
    braces = 0
    for symbol in text:
        braces += (symbol == "{") - (symbol == "}")
        if braces < 0:
            return False
    pairs = (("⦃", "⦄"), ("⟨", "⟩"), (r"\lfloor", r"\rfloor"), (r"\lceil", r"\rceil"))
    if any(text.count(first) != text.count(second) for first, second in pairs) or text.count("|") % 2:
        return "|" in text and "⦃" in text  # a set's condition stands behind one bar
    opened = sum(symbol in "([" for symbol in text)
    closed = sum(symbol in ")]" for symbol in text)
    is_option = re.fullmatch(r"[A-Za-z0-9]{1,3}\)", text) is not None
    return braces == 0 and (opened == closed or is_option)
