r"""One spelling for what can be written in many ways: answers as canonical text, and that text as LaTeX again.

Canonical text has no delimiters, sizes or spacing commands; arguments stand in braces, relations and operators are
single characters (`≤`, `∪`, `±`, `×`), set braces are `⦃⦄`, and `;` stands between the items of a list.
"""

from __future__ import annotations

import re
from functools import lru_cache

from sppo_lightning.verification.extraction import boxes
from sppo_lightning.verification.spelling import spell_out

_NAMED = {
    "≤": "le leq leqslant",
    "≥": "ge geq geqslant",
    "≠": "ne neq",
    "<": "lt",
    ">": "gt",
    "∪": "cup bigcup",
    "∩": "cap bigcap",
    "∖": "setminus",
    "∈": "in",
    "∅": "emptyset varnothing",
    "±": "pm",
    "∓": "mp",
    "'": "prime",
    "×": "cdot times ast",
    "⟨": "langle",
    "⟩": "rangle",
    "⦃": "lbrace",
    "⦄": "rbrace",
    "|": "vert lvert rvert mid",
    "°": "degree",
    "%": "%",
    "$": "$ textdollar",
    "≈": "approx",
    "": "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle limits !",
    " ": ", ; : quad qquad space thinspace",
    r"\frac": "frac dfrac tfrac cfrac",
    r"\text": "text textbf textrm textit textnormal textsf mathrm mbox operatorname",
    r"\mathbf": "mathbf mathit boldsymbol bm",
    r"\binom": "binom dbinom tbinom",
    r"\ldots": "ldots dots cdots",
}
_SPELLING = {"\\" + name: symbol for symbol, names in _NAMED.items() for name in names.split()}
_SPELLING |= {r"\{": "⦃", r"\}": "⦄", "\\ ": " ", "~": " ", "*": "×", "÷": r"\div "}
_COMMAND = re.compile(r"\\[A-Za-z]+ ?|\\[^A-Za-z]|[~*÷]")
_DELIMITERS = re.compile(r"\$\$(.*)\$\$|\$([^$]*[^\\$])\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1}
_TAKES = re.compile(r"\\(?:frac|binom|sqrt)(?![A-Za-z])")
_NESTED = re.compile(r"\\(?:sqrt|frac)(?![A-Za-z])")  # what may itself be an argument without braces
_TOKEN = re.compile(r"\\[A-Za-z]+|[0-9A-Za-z]")
_INFIX = re.compile(
    r"\{(?P<over>[^{}]+)\\(?P<name>over|choose)(?![A-Za-z])(?P<under>[^{}]+)\}"
    r"|^(?P<whole_over>[^{}]+)\\(?P<whole_name>over|choose)(?![A-Za-z])(?P<whole_under>[^{}]+)$"
)
_ALIGNED = re.compile(r"\\(?:begin|end)\s?\{(?:aligned|align|gathered|split|equation)\*?\}")
_NATURAL_LOG = re.compile(r"\\log_(?:e(?![A-Za-z])|\{\s?e\s?\})")
_LONE_GROUP = re.compile(r"(?<=[,;(=+×0-9-])\{(-?[^{}+-]*)\}")  # a sum in braces stays one thing
_SCRIPT = re.compile(r"([_^])\s*(?:\{\s*([^{}]*?)\s*\}|(\\(?!frac|sqrt|binom)[A-Za-z]+|[0-9A-Za-z]))")
_PRIME = re.compile(r"\^\{?('+)\}?")
_SYMBOL = re.compile(r"\{\s*([×±+<>≤≥=:,∪∈-])\s*\}")
_EULER = re.compile(r"(?<=[0-9])([eE])(?= )")  # 2e + 3 is a sum, 2e+3 is 2000
_INEQUALITY = re.compile("[<>≤≥]")
_THIN_COMMA = re.compile(r",\\!\s*")
_FUNCTION_TIMES = re.compile(  # the parser would read `\sin x × y` as `\sin(x × y)`
    r"(\\(?:sin|cos|tan|cot|sec|csc|log|ln)(?:\^\{[^{}]*\})?) ?(\\[a-z]+|[A-Za-z]|[0-9]+)(?= ?×)"
)
_DEGREE = re.compile(r"\^\s?(?:\\circ(?![A-Za-z])|\{\s?\\circ\s?\}|°)")
_TEXT = re.compile(r"\\text\s?\{([^{}]*)\}")
_LONE_LETTER = re.compile(r"(?:(?<![0-9)}. ])\\text\{([A-Za-z])\}|\\text\{([ei])\}|\\mathbf\s?\{([^{}]*)\})")
_JOIN = re.compile(r"\\text\{\s*(or|and)\s*\}|\b(or|and)\b|\\(?:wedge|land)(?![A-Za-z])|\\(?:vee|lor)(?![A-Za-z])")
_COMMA = re.compile(r",\s+")
_FRENCH = re.compile(r"^([\[\]])([^()\[\]]*[,;][^()\[\]]*)([\[\]])$")  # ]0,1[ is open
_SPACES = re.compile(r"\s+")
_INNER_SPACE = re.compile(r"(?<=[0-9A-Za-z.]) (?=[0-9A-Za-z])")
_PREAMBLE = re.compile(
    r"\A(?P<text>\\text\{\s*)?(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?\s*(?(text)\})(?=\s*\S)", re.IGNORECASE
)


class Malformed(ValueError):
    """Text that breaks off in the middle of a formula."""


@lru_cache(maxsize=4096)
def normalize(answer: str) -> str:
    """An answer's canonical text.

    Raises:
        Malformed: For a command without its arguments.
    """
    text = _unwrap(answer).rstrip("\\")
    text = _EULER.sub(r"×\1", spell_out(text))
    text = _SYMBOL.sub(r"\1", _THIN_COMMA.sub(",", text)).replace("<=", "≤").replace(">=", "≥")
    if _ALIGNED.search(text) and r"\\" not in text:
        text = _ALIGNED.sub("", text).replace("&", "")
    if "\\" in text or "~" in text or "*" in text or "÷" in text:
        text = _COMMAND.sub(_respell, text)
        text = _with_arguments(_INFIX.sub(_as_prefix, _NATURAL_LOG.sub(r"\\ln ", text)))
        text = _LONE_LETTER.sub(_lone_letter, _DEGREE.sub("°", _SYMBOL.sub(r"\1", text)))
    text = _SCRIPT.sub(lambda match: f"{match[1]}{{{match[2] if match[3] is None else match[3]}}}", text)
    text = _PRIME.sub(r"\1", _FUNCTION_TIMES.sub(r"\1(\2)", text))
    text = _LONE_GROUP.sub(r"\1", _COMMA.sub(";", _JOIN.sub(_joint, text.strip()))).replace("⦃⦄", "∅")
    if (whole := _TEXT.fullmatch(text)) is not None:
        text = whole[1].strip()
    text = _unwrap(text)
    if "nswer" in text:
        text = _PREAMBLE.sub("", text, count=1)
    # a space between two digits or letters stays: "1 2" is not 12
    text = _INNER_SPACE.sub("\0", _SPACES.sub(" ", text)).replace(" ", "").replace("\0", " ")
    text = _FRENCH.sub(
        lambda match: ("(" if match[1] == "]" else "[") + match[2] + (")" if match[3] == "[" else "]"), text
    )
    return text.strip(" ,;:").removesuffix(".").replace("+\\infty", "\\infty")


def _unwrap(text: str) -> str:
    """Text without delimiters, boxes, braces and full stops around it."""
    while True:
        before, text = text, text.strip().removesuffix(".").rstrip()
        if match := _DELIMITERS.fullmatch(text):
            text = next(group for group in match.groups() if group is not None)
        elif text.startswith(("\\boxed", "\\fbox")):
            box = boxes(text)
            text = box[0].content if len(box) == 1 and box[0].end == len(text) else text
        elif text.startswith("{") and text.endswith("}") and _closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            return text


def _respell(match: re.Match[str]) -> str:
    command = match.group().rstrip(" ") or match.group()
    # what is kept as a command needs a space before a letter
    return _SPELLING.get("\\ " if command == "\\" else command, match.group())


def _as_prefix(match: re.Match[str]) -> str:
    over, name, under = (part.strip() for part in match.groups() if part is not None)
    return rf"\{'frac' if name == 'over' else 'binom'}{{{over}}}{{{under}}}"


def _lone_letter(match: re.Match[str]) -> str:
    before = match.string[: match.start()][-1:]
    return (" " if before.isalpha() else "") + (match[1] or match[2] or match[3])


def _joint(match: re.Match[str]) -> str:
    """A list's separator; `∧` between inequalities that hold together."""
    together = "and" in match.group() or "wedge" in match.group() or "land" in match.group()
    return "∧" if together and _INEQUALITY.search(match.string) else ";"


def _with_arguments(text: str) -> str:
    """Text whose fractions, binomials and roots have all their arguments in braces."""
    parts, at = [], 0
    for match in _TAKES.finditer(text):
        if match.start() < at:
            continue  # an argument itself, as in `\\frac\\sqrt2 3`
        end = match.end()
        parts.append(text[at:end])
        if match.group() == r"\sqrt" and text[end : end + 1] == "[":
            close = text.find("]", end)
            if close < 0:
                raise Malformed("a root's index is never closed")
            parts.append(text[end : close + 1])
            end = close + 1
        for _ in range(_ARGUMENTS[match.group()]):
            argument, end = _argument(text, end)
            if not argument.strip():
                raise Malformed("a command lacks an argument")
            parts.append("{" + _with_arguments(argument) + "}")
        at = end
    return "".join(parts) + text[at:] if parts else text


def _argument(text: str, at: int) -> tuple[str, int]:
    """The argument that starts at `at`, a group in braces or a single token, and where it ends."""
    while text[at : at + 1] == " ":
        at += 1
    if text[at : at + 1] == "{":
        close = _closing(text, at)
        return text[at + 1 : close], close + 1
    if match := _NESTED.match(text, at):
        end = match.end()
        for _ in range(_ARGUMENTS[match.group()]):
            _, end = _argument(text, end)
        return text[at:end], end
    token = _TOKEN.match(text, at)
    if token is None:
        raise Malformed("a command lacks an argument")
    return token.group(), token.end()


def _closing(text: str, at: int) -> int:
    """Where the brace that opens at `at` is closed."""
    depth = 0
    for place in range(at, len(text)):
        if text[place] in "{}" and (place == 0 or text[place - 1] != "\\"):
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place
    raise Malformed("a brace is never closed")


_LATEX = str.maketrans(
    {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "}
    | {
        "∖": r"\setminus ",
        "∧": r"\land ",
        "±": r"\pm ",
        "×": r"\cdot ",
        "⟨": r"\langle ",
        "⟩": r"\rangle ",
        "⦃": r"\{",
        "⦄": r"\}",
        ";": ",",
    }
)
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_DEGREES = re.compile(r"([0-9]+|\\frac\{[0-9]+\}\{[0-9]+\})°")
_PRODUCT = re.compile(r"(?<=[0-9)])(?=[({]|\\(?:binom|frac|lfloor|lceil))")  # the parser would add the two
_COMMA_IN_BRACKETS = re.compile(r"[(\[][^()\[\]]*,")
# the parser would read them as the imaginary unit and as Euler's constant
_UPPER_I = re.compile(r"(?<![A-Za-z\\])I(?![A-Za-z])")
_GAMMA = re.compile(r"\\([Gg])amma(?![A-Za-z(])")
_MIXED = re.compile(r"(?<![0-9.}A-Za-z])([0-9]+)(\\frac\{[0-9]+\}\{[0-9]+\})")
_GROUPED = re.compile(r"(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")


def to_latex(canonical: str) -> str:
    """Canonical text as LaTeX for a parser, with exact fractions for decimals and radians for degrees."""
    text = _GAMMA.sub(lambda match: rf"\Xi_{{{ord(match[1])}}}", _UPPER_I.sub(r"\\Xi_{73}", canonical))
    text = _PRODUCT.sub(r"\\cdot ", _MIXED.sub(r"(\1+\2)", text))
    if not _COMMA_IN_BRACKETS.search(text):
        text = _GROUPED.sub(lambda match: match.group().replace(",", ""), text)
    text = _DECIMAL.sub(lambda match: rf"\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}", text)
    return _DEGREES.sub(r"\\frac{\1\\pi}{180}", text).translate(_LATEX)
