"""The exceptions of mora_ds, and the messages that settings have in common.

`runtime/cli.py` turns the exceptions into exit codes: 2 for `UserError`, 3 for
`NonFatalFailure`, 75 for `Stopped`, 1 for all other errors. Classes of settings have a
method `problems()` that lists what is wrong with their values, one message each.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from pydantic_core import PydanticCustomError, core_schema


class UserError(ValueError):
    """A mistake in a flag, a file or a setting. The message names what to change."""


class RunError(RuntimeError):
    """A failure while running: NaN loss, full disk, damaged checkpoint."""


class NonFatalFailure(RunError):
    """The run is trained to its end and saved, but something that is not training has
    failed: an evaluation, a task, a tracker, an upload. All processes raise it
    alike."""

    is_shared = True


NON_FATAL_ERRORS = (Exception, SystemExit)
"""The errors that do not end a run. Other packages may even call sys.exit."""


class Stopped(BaseException):
    """The run was stopped by a signal; the message says what was saved.

    Not an `Exception`, so that no `except Exception` on the way swallows it.
    """


def raise_validation_errors(problems: Iterable[str]) -> None:
    """Raises one `UserError` with all `problems`, a line each, if there are any."""
    if lines := list(dict.fromkeys(problems)):
        raise UserError("\n".join(lines))


def validation_errors_of(check: Callable[..., object], *arguments: object) -> list[str]:
    """The lines of the `UserError` that `check(*arguments)` raises, if it does."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error).splitlines()
    return []


def whole_number(value: object, least: int, argument: str, otherwise: str = "") -> int:
    """An argument of a public function as an int from `least` on.

    Raises `UserError` that begins with the words `argument` for another value, a bool
    among them; `otherwise`: what else it may be.
    """
    number = None
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
    if number is None or not least <= number < _TOO_LARGE:
        raise UserError(
            f"{argument} must be a whole number from {least} on{otherwise}, got {value!r}"
        )
    return number


@contextmanager
def named_as_flags(*names: str, **renamed: str) -> Iterator[None]:
    """Within, a `UserError` names the flags of a program. The functions of Python's
    users name their arguments, `rank`, which here becomes --rank, where it is one of
    `names`, or what `renamed` has for it."""
    flags = {**{name: f"--{name}" for name in names}, **renamed}
    try:
        yield
    except UserError as error:
        text = re.sub(r"`(\w+)`", lambda word: flags.get(word[1], word[0]), str(error))
        error.args = (text,)
        raise


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as " Did you mean 'merge_every'?" for a misspelt or shortened `word`,
    or ""."""
    candidates = [candidate for candidate in known if candidate != word]
    close = difflib.get_close_matches(word, candidates, cutoff=0.8)
    close += [name for name in candidates if _shortens(word, name)]
    close += difflib.get_close_matches(word, candidates)
    return f" Did you mean {close[0]!r}?" if close else ""


def _shortens(word: str, name: str) -> bool:
    """Whether `word` has the initials of `name`, as lr of learning_rate, or the
    beginnings of some of its words, as batch_size of train_batch_size."""
    letters = word.lstrip("-")
    full_name = f"_{name.lstrip('-')}"
    return any(
        re.search("_" + ".*_".join(map(re.escape, beginnings)), full_name)
        for beginnings in (letters.split("_"), letters)
    )


def reason(error: BaseException) -> str:
    """The message of another library's error in one line, for use in our own; a line
    that ends with a colon is followed by the next one. A message without words, such as
    that of a KeyError, follows the name of the error."""
    lines = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        lines.append(line)
        if not line.endswith(":"):
            break
    text = " ".join(lines)
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


def unusable_words(argv: Sequence[str]) -> list[str]:
    """One message for each empty word of a command line, as an unset variable leaves,
    and for each that is not read as UTF-8."""
    problems = []
    for before, word in pairwise(["", *argv]):
        # Bytes that Python could not decode are lone surrogates, which no UTF-8 file can
        # hold: every record of the run would fail.
        raw = word.encode(errors="surrogateescape")
        as_utf8 = raw.decode(errors="backslashreplace")
        if word == "" or (word.startswith("--") and word.endswith("=")):
            name = word[:-1] or before or "the first argument"
            problems.append(
                f"{name} must not be empty: is a variable of the shell unset?"
            )
        elif word != as_utf8:
            problems.append(
                f"{as_utf8} is not UTF-8, or not read as such: rename it, or set LC_ALL=C.UTF-8"
            )
    return problems


def unknown(what: str, value: object, known: Iterable[str]) -> str:
    """The message for a `value` that is none of the `known` ones. `what` is a flag with
    its dashes, or a noun."""
    known = list(known)
    hint = nearest(str(value), known)
    return f"unknown {what} {value!r}; known: {', '.join(known)}.{hint}"


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may have, `above` and `below` excluded; no NaN."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def allow(self, value: float) -> bool:
        return (
            isinstance(value, Real)
            and self.least <= value <= self.most
            and self.above < value < self.below
        )

    def require(self, value: float) -> float:
        """The value. Raises the error that pydantic collects where it is not
        allowed."""
        if not self.allow(value):
            raise PydanticCustomError("bounds", f"must be {self}")
        return value

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> Any:
        """Of what pydantic checks: `Annotated[int, Bounds(least=1)]`."""
        return core_schema.no_info_after_validator_function(self.require, handler(kind))

    def __str__(self) -> str:
        bounds = {
            "at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        finite = {word: bound for word, bound in bounds.items() if math.isfinite(bound)}
        return " and ".join(
            f"{word} {bound:,.0f}"
            if 1e6 <= bound <= _TOO_LARGE
            else f"{word} {bound:g}"
            for word, bound in finite.items()
        )


COUNT = Bounds(least=1)
NOT_NEGATIVE = Bounds(least=0)
POSITIVE = Bounds(above=0)
BELOW_1 = Bounds(least=0, below=1)
AT_MOST_1 = Bounds(least=0, most=1)
ABOVE_0_AT_MOST_1 = Bounds(above=0, most=1)
SECONDS = Bounds(least=0, most=1e9)
"""A waiting time of at most 31 years; Python's clocks refuse more than 292."""

_TOO_LARGE = 2**63
"""Whole numbers from here on do not fit in the integers of torch and numpy."""


def out_of_bounds(flag: str, value: float | None, bounds: Bounds) -> Iterator[str]:
    """A message for a value outside of its bounds, or a whole number of more than 63
    bits; None is always allowed."""
    if isinstance(value, int) and value >= _TOO_LARGE:
        yield f"--{flag} must be below {_TOO_LARGE}, got {value}"
    elif value is not None and not bounds.allow(value):
        yield f"--{flag} must be {bounds}, got {value}"


def wrong_values(
    settings: object, allowed: Mapping[str, Bounds | type[Enum]]
) -> Iterator[str]:
    """One message for each attribute that its bounds or enum forbid, named as a
    flag."""
    for name, values in allowed.items():
        value = getattr(settings, name)
        if isinstance(values, Bounds):
            yield from out_of_bounds(name, value, values)
        elif value not in (known := [member.value for member in values]):
            yield unknown(f"--{name}", value, known)
