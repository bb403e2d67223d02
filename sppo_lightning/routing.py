"""Verifiers' settings, and which of them scores which response: checked before the first one is sampled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sppo_lightning.batch import Prompt
from sppo_lightning.errors import InputError, check_option, nearest

if TYPE_CHECKING:
    from sppo_lightning.callbacks.verifier import Verifier

Role = Literal["outcome", "shaping"]
Truncated = Literal["scored", "unanswered"]

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def check_settings(verifier: Verifier) -> None:
    """Raise `InputError` for a setting of every verifier that cannot be used."""
    who = type(verifier).__name__
    check_option(f"{who}.role", verifier.role, Role)
    check_option(f"{who}.truncated", verifier.truncated, Truncated)
    if verifier.applies_to is not None and not verifier.applies_to:
        raise InputError(f"`{who}.applies_to`=[] names no data set; name one, or leave it out for all.")
    if not math.isfinite(verifier.weight) or (verifier.role == "outcome" and verifier.weight <= 0):
        raise InputError(
            f"`{who}.weight`={verifier.weight} cannot weigh {verifier.role} scores; use a "
            f"{'positive' if verifier.role == 'outcome' else 'finite'} number."
        )
    if not 0 <= verifier.max_failure_rate <= 1:
        raise InputError(
            f"`{who}.max_failure_rate`={verifier.max_failure_rate} is no share of a batch; "
            "use a number from 0 to 1."
        )
    if not _NAME.fullmatch(verifier.name):
        raise InputError(
            f"`{who}.name`={verifier.name!r} cannot be part of a metric's name; "
            "use letters, digits, '_', '-' and '.'."
        )


def check_together(verifier: Verifier, verifiers: Sequence[Verifier]) -> None:
    """Check a verifier against all of the run's.

    Raises:
        InputError: Where another has its name, and where it asks which responses are correct and comes before one
            that says so.
    """
    for other in verifiers:
        if other is not verifier and other.name == verifier.name:
            raise InputError(
                f"`trainer.callbacks` has two verifiers named {verifier.name!r} ({type(other).__name__} and "
                f"{type(verifier).__name__}); give one of them another `name`."
            )
    for judge in verifiers[verifiers.index(verifier) :] if "scores" in verifier.requires else ():
        if judge.role == "outcome" and not judge.only_if_correct:
            raise InputError(
                f"`trainer.callbacks` lists {verifier.name!r}, which asks whether a response is correct, before "
                f"{judge.name!r}, which judges that; move {judge.name!r} above it."
            )


def check_routes(verifiers: Sequence[Verifier], data: Any, stage: str) -> None:
    """Raise `InputError` for a data set that `applies_to` names and nobody has, and for a prompt nobody scores.

    Args:
        verifiers: All of the run's.
        data: The run's data module, already set up; nothing is checked for one that cannot list its `prompts`.
        stage: Only "fit" has all data sets that the settings may name, and "predict" needs no score.
    """
    if not hasattr(data, "prompts") or all(verifier.applies_to is None for verifier in verifiers):
        return
    by_source: dict[frozenset[str], Prompt] = {}  # the first prompt of each kind stands for the others
    for prompt in data.prompts():
        by_source.setdefault(frozenset(prompt.sources), prompt)
    known = set[str]().union(*by_source)
    for verifier in verifiers if stage == "fit" else ():
        for name in set(verifier.applies_to or ()) - known:
            raise InputError(
                f"`applies_to` of {verifier.name!r} names {name!r}{nearest(name, known)}; the data sets of this "
                f"run are {', '.join(sorted(known))}."
            )
    for prompt in by_source.values() if stage != "predict" else ():
        if not any(verifier.role == "outcome" and verifier.applies(prompt) for verifier in verifiers):
            raise InputError(
                f"No verifier of the role outcome applies to the data set {' / '.join(sorted(prompt.sources))} "
                f"(row {prompt.row}); add it to the `applies_to` of one."
            )


def why_unusable(prompt: Prompt, verifiers: Iterable[Verifier]) -> str | None:
    """What the first verifier that can do nothing with a prompt says of it."""
    for verifier in verifiers:
        if verifier.applies(prompt) and (why := verifier.unusable(prompt)) is not None:
            return why
    return None
