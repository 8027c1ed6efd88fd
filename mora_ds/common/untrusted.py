"""Values from a file are only data: each type, name, path, number and size is checked
here before it is used.

    plain_json, read_text        bounded in size and depth, before memory is taken
    typed(hint, value, where)    a value of JSON or YAML as a type: a dataclass, list[int], dict[str, FileName], ...
    typed_fully                  the same, where no field may be left to its default
    file_name, relative_path     text of a file that becomes a part of a path
    require_plain(folder)        no symbolic link, pipe or device inside a checkpoint or an adapter
    expanded(path, flag)         a path with ~ in it

All of them raise `UserError`, whose text begins with `where`: the file, and the place
in it.
"""

import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, TypeAdapter, ValidationError

from mora_ds.common.errors import Bounds, UserError, validation_errors_of

MAX_BYTES = 32 * 2**20
"""Largest JSON file, in bytes. Parsed, it may take 25 times as much memory; the layout
of shards with 100,000 parameters has 10 MiB."""
MAX_DEPTH = 64
"""Deepest nesting of JSON."""
MAX_SIDE = 1 << 24
"""Longest side of a layer: far above any vocabulary."""

_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, line breaks and turns of direction: they would change a
message."""

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: Any) -> str:
    """`repr` of a value for a message, cut to a line."""
    return _short.repr(value)


# -- text and JSON ---------------------------------------------------------------------


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises `UserError` for a larger one and
    for one that is no text, OSError where it cannot be read."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or _is_of_shell(path)):
        # A pipe would wait for ever
        raise UserError(f"{path} is no file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(
            f"{path} is larger than the {limit:,} bytes that such a file may have"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _is_of_shell(path: Path) -> bool:
    """Whether a shell gives a pipe by such a name: /dev/stdin, /dev/fd/63."""
    return path == Path("/dev/stdin") or path.parent == Path("/dev/fd")


def parse_json(text: str, **options: Any) -> Any:
    """`json.loads`. Raises ValueError also for brackets that are nested too deeply, and
    one with a message for users for a number that is too long; `json.JSONDecodeError`
    has the line."""
    try:
        return json.loads(text, **options)
    except (json.JSONDecodeError, UserError):
        raise
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except ValueError:
        raise ValueError(
            f"a number has more than {sys.get_int_max_str_digits()} digits"
        ) from None


def plain_json(text: str, where: object) -> Any:
    """JSON of bounded size and depth, whose texts can be printed and written. Raises
    `UserError`."""
    if len(text) > MAX_BYTES:
        raise UserError(
            f"{where} is larger than the {MAX_BYTES:,} characters that such JSON may have"
        )
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    _check_depth(content, where)
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is damaged: it has no Unicode text in {shown(error.object[error.start])}"
        ) from error
    return content


def _check_depth(value: Any, where: object, depth: int = 1) -> None:
    """Raises `UserError` where a value lies deeper than `MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        raise UserError(f"{where} is damaged: nested more than {MAX_DEPTH} deep")
    children = value.values() if isinstance(value, dict) else value
    for child in children if isinstance(value, (dict, list)) else ():
        _check_depth(child, where, depth + 1)


# -- typed values ----------------------------------------------------------------------


def file_name(text: str) -> str:
    """`text`, if it can be the name of one file or folder and be printed."""
    if text in ("", ".", "..") or "/" in text or "\\" in text or not text.isprintable():
        raise UserError(
            f"{shown(text)} cannot be the name of a file, nor a part of one"
        )
    if len(text.encode()) > 240:
        raise UserError(f"a name of {len(text)} characters, {shown(text)}, is too long")
    return text


def relative_path(text: str) -> str:
    """`text`, if it is a path of a file below a folder: a/b/c, each part a
    `file_name`."""
    for component in text.split("/"):
        file_name(component)
    return text


def any_path(text: str) -> str:
    """`text`, if it can be a path at all, in any script, wherever it leads: it is only
    read, and what is there is compared."""
    is_long = len(text.encode()) > 4000 or max(map(len, text.split("/"))) > 255
    if not text or is_long or _UNSHOWN.search(text):
        raise UserError(f"{shown(text)} cannot be a path")
    return text


FileName = Annotated[str, AfterValidator(file_name)]
"""Names of parameters and modules too: some tools make files of them."""
RelativePath = Annotated[str, AfterValidator(relative_path)]
AnyPath = Annotated[str, AfterValidator(any_path)]
Count = Annotated[int, Bounds(least=0, below=2**63)]
Side = Annotated[int, Bounds(least=1, most=MAX_SIDE)]
Processes = Annotated[int, Bounds(least=1, most=1 << 20)]

_PROBLEMS = {
    "missing": "is missing",
    "unexpected_keyword_argument": "is unknown",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "dataclass_type": "must be a mapping",
}
"""Pydantic's type of an error -> what it says."""


def typed(hint: Any, value: Any, where: object) -> Any:
    """A value of JSON or YAML, checked by pydantic to be a `hint`; of dataclasses,
    tuples and enums an instance. Raises `UserError`. True and False are no numbers, and
    nothing is converted but whole numbers where floats are wanted. `Annotated` may have
    `Bounds`."""
    try:
        text = json.dumps(value)
        return _adapter(hint).validate_json(text, strict=True, extra="forbid")
    except TypeError as error:
        # JSON has no form for the value, such as for a date of YAML
        raise UserError(f"{where}: {error}") from error
    except ValidationError as error:
        unknown_key = "unexpected_keyword_argument"
        # An unknown key first: where it is misspelt, another one is missing
        first = min(error.errors(), key=lambda detail: detail["type"] != unknown_key)
    steps = [
        f"[{step}]" if isinstance(step, int) else f": {step}" for step in first["loc"]
    ]
    entry_name = f"{where}{''.join(steps)}"
    if not entry_name.isprintable():
        entry_name = f"{where}: {shown(first['loc'])}"
    if first["type"] == "value_error":
        # Raised by a function that checks the value, or by the class that is made of it
        raise UserError(f"{entry_name}: {first['ctx']['error']}")
    problem = _PROBLEMS.get(first["type"], f"is refused: {first['msg']}")
    if first["type"] == "bounds":
        problem = first["msg"]
    got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
    raise UserError(f"{entry_name} {problem}{got}")


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def typed_fully(cls: Any, value: Any, where: object) -> Any:
    """As `typed`, of a dataclass that mora_ds has written with all of its fields."""
    instance = typed(cls, value, where)
    for field in fields(cls):
        if field.init and field.name not in value:
            raise UserError(f"{where}: {field.name} is missing")
    return instance


def wrong_types(settings: Any) -> Iterator[str]:
    """One message for each field of a dataclass with a value of another type."""
    hints = get_type_hints(settings.__class__, include_extras=True)
    for field in fields(settings):
        name = field.name
        yield from validation_errors_of(
            typed, hints[name], getattr(settings, name), name
        )


def entry(content: dict[str, Any], key: str, hint: Any, where: object) -> Any:
    """`content[key]` as a `hint`. Raises `UserError`, also where there is no such
    key."""
    if key not in content:
        raise UserError(f"{where} is damaged: {key} is missing")
    return typed(hint, content[key], f"{where} is damaged: {key}")


# -- folders ---------------------------------------------------------------------------


def links(folder: Path) -> list[str]:
    """A message for every link, pipe, socket and device under `folder`, not
    followed."""
    problems = []

    def note(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be read: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=note):
        for path in sorted(Path(parent, name) for name in (*folders, *names)):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                problems.append(
                    f"{path} is a link to {path.readlink()}, and links are not followed"
                )
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                problems.append(f"{path} is neither a file nor a folder")
    return problems


def require_plain(folder: Path) -> None:
    """Raises `UserError` where `folder` has anything in it but files and folders."""
    if problems := links(folder):
        raise UserError(
            f"{problems[0]}: make a copy that holds the files themselves (cp -rL)"
        )


def expanded(path: str | Path, flag: str = "") -> Path:
    """`path` with the home folder in place of ~ or ~USER. Raises `UserError` naming
    `flag` where that is not known, and where the disk does not let one look whether
    anything is there."""
    try:
        full_path = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            full_path.stat()
        return full_path
    except OSError as error:
        # The name is too long, links form a loop, or a folder may not be entered
        raise UserError(f"{flag} {path}: {error.strerror}".lstrip()) from error
    except ValueError as error:
        # There is a byte of zero in it
        raise UserError(f"{flag} {path!r}: {error}".lstrip()) from error
    except RuntimeError:
        home = Path(path).parts[0]
        raise UserError(
            f"{flag} {path}: no home folder is known for {home}; write the path itself".lstrip()
        ) from None
