"""The exceptions of mora_ds, and common checks and messages of settings.

`runtime/cli.py` maps exceptions to exit codes: 2 for `UserError`, 3 for
`NonFatalFailure`, 75 for `Stopped`, 1 for all other errors. Classes of settings have a
method `problems()` that returns a message for each invalid value.
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
    """An error in a flag, a file or a setting. The message names what to change."""


class RunError(RuntimeError):
    """A failure during a run: NaN loss, full disk, damaged checkpoint."""


class NonFatalFailure(RunError):
    """The run is trained and saved, but an evaluation, a task, a tracker or an upload
    has failed. Raised on all ranks."""

    is_shared = True


MOST_PROBLEMS = 100
"""How many unknown keys of a file are named: each is compared with all known ones."""

NON_FATAL_ERRORS = (Exception, SystemExit)
"""Errors that are not fatal in evaluations, tasks, trackers and uploads. Third-party
packages may even call sys.exit."""


class Stopped(BaseException):
    """The run was stopped by a signal; the message says what was saved.

    Not an `Exception`, so that no `except Exception` suppresses it.
    """


def raise_validation_errors(problems: Iterable[str]) -> None:
    """Raise one `UserError` with all `problems`, one per line, if there are any."""
    if lines := list(dict.fromkeys(problems)):
        raise UserError("\n".join(lines))


def validation_errors_of(check: Callable[..., object], *arguments: object) -> list[str]:
    """The lines of the `UserError` that `check(*arguments)` raises; [] if it raises
    none."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error).splitlines()
    return []


def whole_number(value: object, least: int, argument: str, otherwise: str = "") -> int:
    """An argument of a public function as an int that is at least `least`.

    Raises `UserError` for other values, including bool. `argument`: the start of the
    message. `otherwise`: text about other accepted values.
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
    """A context for programs that replaces arguments in a `UserError` by flags: `rank`
    becomes --rank if it is in `names`, or the value in `renamed`."""
    flags = {**{name: f"--{name}" for name in names}, **renamed}
    try:
        yield
    except UserError as error:
        text = re.sub(r"`(\w+)`", lambda word: flags.get(word[1], word[0]), str(error))
        error.args = (text,)
        raise


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as " Did you mean 'merge_every'?" for a misspelled or shortened
    `word`, or ""."""
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
    """The first line of another library's error message, with the next lines as long as
    a line ends with a colon. A message of one word, such as that of a KeyError, follows
    the name of the error."""
    lines = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        lines.append(line)
        if not line.endswith(":"):
            break
    text = " ".join(lines)
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


def unusable_words(argv: Sequence[str]) -> list[str]:
    """One message for each empty word of a command line, caused by an unset variable,
    and for each word that is not valid UTF-8."""
    problems = []
    for before, word in pairwise(["", *argv]):
        # Python decodes invalid bytes to lone surrogates, which cannot be written to
        # UTF-8 files: every record of the run would fail.
        raw = word.encode(errors="surrogateescape")
        as_utf8 = raw.decode(errors="backslashreplace")
        if word == "" or (word.startswith("--") and word.endswith("=")):
            name = word[:-1] or before or "the first argument"
            problems.append(
                f"{name} must not be empty: is a variable of the shell unset?"
            )
        elif word != as_utf8:
            problems.append(
                f"{as_utf8} is not UTF-8, or the locale is not: rename it, or set LC_ALL=C.UTF-8"
            )
    return problems


def unknown(what: str, value: object, known: Iterable[str]) -> str:
    """The message for a `value` that is not among the `known` ones. `what`: a flag with
    its dashes, or a noun."""
    known = list(known)
    hint = nearest(str(value), known)
    return f"unknown {what} {value!r}; known: {', '.join(known)}.{hint}"


@dataclass(frozen=True)
class Bounds:
    """The valid range of a number; `above` and `below` are exclusive. NaN is never
    valid."""

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
        """Return the value. Raises an error for pydantic if it is not allowed."""
        if not self.allow(value):
            raise PydanticCustomError("bounds", f"must be {self}")
        return value

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> Any:
        """Makes pydantic check `Annotated[int, Bounds(least=1)]`."""
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
"""At most 31 years; Python's clocks do not support more than 292."""

_TOO_LARGE = 2**63
"""The smallest positive integer that does not fit in int64."""


def out_of_bounds(flag: str, value: float | None, bounds: Bounds) -> Iterator[str]:
    """A message for a value outside of its bounds, or an int of more than 63 bits. None
    is always allowed."""
    if isinstance(value, int) and value >= _TOO_LARGE:
        yield f"--{flag} must be below {_TOO_LARGE}, got {value}"
    elif value is not None and not bounds.allow(value):
        yield f"--{flag} must be {bounds}, got {value}"


def wrong_values(
    settings: object, allowed: Mapping[str, Bounds | type[Enum]]
) -> Iterator[str]:
    """One message for each attribute with a value outside of its bounds or enum; it
    names the attribute's flag."""
    for name, values in allowed.items():
        value = getattr(settings, name)
        if isinstance(values, Bounds):
            yield from out_of_bounds(name, value, values)
        elif value not in (known := [member.value for member in values]):
            yield unknown(f"--{name}", value, known)
