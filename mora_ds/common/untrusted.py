"""Checks values from untrusted files before they are used: types, names, paths, numbers
and sizes.

    open_file                    opens a regular file, never a pipe or a device
    plain_json, read_text        check size and depth before memory is allocated
    typed(hint, value, where)    converts a JSON or YAML value to a type: a dataclass, list[int], ...
    typed_fully                  the same, but all fields are required
    file_name, relative_path     check a string that becomes a part of a path
    require_plain(folder)        rejects links, pipes and devices in a checkpoint or an adapter
    expanded(path, flag)         expands ~ in a path

All of them raise `UserError` whose message starts with `where`: the file and the
position in it.
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
from io import BufferedReader
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, TypeAdapter, ValidationError

from mora_ds.common.errors import Bounds, UserError, validation_errors_of

MAX_BYTES = 32 * 2**20
"""Maximum size of a JSON file, in bytes. Parsing takes up to 25 times as much memory. The
layout of shards with 100,000 parameters takes 10 MiB."""
MAX_DEPTH = 64
"""Maximum nesting depth of JSON."""
MAX_SIDE = 1 << 24
"""Maximum side of a layer: far above any vocabulary."""

_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, line breaks and text direction marks, which could falsify a
message."""

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: Any) -> str:
    """`repr` of a value for a message, shortened to a line."""
    return _short.repr(value)


# -- text and JSON ---------------------------------------------------------------------


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Read a UTF-8 file of at most `limit` bytes. Raises `UserError` for a larger file
    and for one that is not text, and OSError if it cannot be read."""
    with open_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(
            f"{path} is larger than {limit:,} bytes, the maximum for such a file"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading. Raises `UserError` for a pipe, a socket or a device, which
    could block forever or have no end, and OSError."""
    if _is_shell_pipe(path):
        return path.open("rb")
    # Without O_NONBLOCK, to open a pipe would block already
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(descriptor)
        raise UserError(f"{path} is no file")
    return os.fdopen(descriptor, "rb")


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without their ends, each of at most `MAX_BYTES`: a longer
    one is split."""
    with open_file(path) as file:
        while line := file.readline(MAX_BYTES):
            yield line.decode(errors="replace").rstrip("\r\n")


def _is_shell_pipe(path: Path) -> bool:
    """Whether this is a name of a shell's pipe: /dev/stdin, /dev/fd/63."""
    return path == Path("/dev/stdin") or path.parent == Path("/dev/fd")


def parse_json(text: str, **options: Any) -> Any:
    """`json.loads`. Also raises ValueError for too deep nesting and for a number with too
    many digits, with a message for users. `json.JSONDecodeError` has the line."""
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
    """Parse JSON of limited size and depth, with strings that can be encoded. Raises
    `UserError`."""
    if len(text) > MAX_BYTES:
        raise UserError(
            f"{where} is larger than {MAX_BYTES:,} characters, the maximum for such JSON"
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
            f"{where} is damaged: it contains {shown(error.object[error.start])}, which is not valid Unicode"
        ) from error
    return content


def _check_depth(value: Any, where: object, depth: int = 1) -> None:
    """Raise `UserError` for nesting deeper than `MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        raise UserError(f"{where} is damaged: nested deeper than {MAX_DEPTH} levels")
    children = value.values() if isinstance(value, dict) else value
    for child in children if isinstance(value, (dict, list)) else ():
        _check_depth(child, where, depth + 1)


# -- typed values ----------------------------------------------------------------------


def file_name(text: str) -> str:
    """Return `text` if it is a valid, printable name of a file or folder."""
    if text in ("", ".", "..") or "/" in text or "\\" in text or not text.isprintable():
        raise UserError(
            f"{shown(text)} cannot be the name of a file, nor a part of one"
        )
    if len(text.encode()) > 240:
        raise UserError(f"a name of {len(text)} characters, {shown(text)}, is too long")
    return text


def relative_path(text: str) -> str:
    """Return `text` if it is a path below a folder: a/b/c, each part a `file_name`."""
    for component in text.split("/"):
        file_name(component)
    return text


def any_path(text: str) -> str:
    """Return `text` if it is a possible path to any place, in any script. Only for paths
    that are read, and whose contents are verified."""
    is_long = len(text.encode()) > 4000 or max(map(len, text.split("/"))) > 255
    if not text or is_long or _UNSHOWN.search(text):
        raise UserError(f"{shown(text)} cannot be a path")
    return text


FileName = Annotated[str, AfterValidator(file_name)]
"""Also for names of parameters and modules, because some tools create files with these
names."""
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
"""Pydantic's error type -> our message."""


def typed(hint: Any, value: Any, where: object) -> Any:
    """Convert a JSON or YAML value to the type `hint` with pydantic; creates instances of
    dataclasses, tuples and enums. Raises `UserError`. Strict: bools are not numbers, and
    only ints are converted, to floats. `Annotated` types may have `Bounds`."""
    try:
        text = json.dumps(value)
        return _adapter(hint).validate_json(text, strict=True, extra="forbid")
    except TypeError as error:
        # JSON cannot represent the value, such as a date of YAML
        raise UserError(f"{where}: {error}") from error
    except ValidationError as error:
        unknown_key = "unexpected_keyword_argument"
        # An unknown key first: if it is misspelled, another key is missing
        first = min(error.errors(), key=lambda detail: detail["type"] != unknown_key)
    steps = [
        f"[{step}]" if isinstance(step, int) else f": {step}" for step in first["loc"]
    ]
    entry_name = f"{where}{''.join(steps)}"
    if not entry_name.isprintable():
        entry_name = f"{where}: {shown(first['loc'])}"
    if first["type"] == "value_error":
        # Raised by a validator, or by the class that is created
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
    """As `typed`, for a dataclass of which all fields must be in the file."""
    instance = typed(cls, value, where)
    for field in fields(cls):
        if field.init and field.name not in value:
            raise UserError(f"{where}: {field.name} is missing")
    return instance


def wrong_types(settings: Any) -> Iterator[str]:
    """One message for each field of a dataclass whose value has a wrong type."""
    hints = get_type_hints(settings.__class__, include_extras=True)
    for field in fields(settings):
        name = field.name
        yield from validation_errors_of(
            typed, hints[name], getattr(settings, name), name
        )


def entry(content: dict[str, Any], key: str, hint: Any, where: object) -> Any:
    """`content[key]` converted to `hint`. Raises `UserError`, also for a missing
    key."""
    if key not in content:
        raise UserError(f"{where} is damaged: {key} is missing")
    return typed(hint, content[key], f"{where} is damaged: {key}")


# -- folders ---------------------------------------------------------------------------


def links(folder: Path) -> list[str]:
    """A message for every link, pipe, socket and device under `folder`. Does not follow
    links."""
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
    """Raise `UserError` if `folder` contains anything other than files and folders."""
    if problems := links(folder):
        raise UserError(
            f"{problems[0]}: make a copy with the files instead of links (cp -rL)"
        )


def is_url(path: str | Path) -> bool:
    """Whether it is s3://bucket/run, or the like."""
    return "://" in str(path)


_CREDENTIALS = re.compile(r"://[^/]*:(?!\d+(/|$))|^https?://[^/]*@|\?.*=")
"""KEY:SECRET@ before a bucket, but no port, and no container@account of Azure; TOKEN@ of
a web server; and the query of a presigned URL."""


def check_url(url: str, flag: str) -> None:
    """Raise `UserError` for a URL with credentials, which runs would record and
    print."""
    if _CREDENTIALS.search(url):
        raise UserError(
            f"{flag}: leave credentials out of the URL, which is recorded and printed; its library finds them in the "
            "environment and in its files".lstrip(": ")
        )


def expanded(path: str | Path, flag: str = "") -> Path:
    """`path` with ~ or ~USER replaced by the home folder. Raises `UserError` that names
    `flag` for a URL, if the home folder is unknown, and if the path cannot be
    accessed."""
    if is_url(path):
        raise UserError(
            f"{flag} {path}: URLs are not supported; give a path on a disk".lstrip()
        )
    try:
        full_path = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            full_path.stat()
        return full_path
    except OSError as error:
        # The name is too long, links form a loop, or a folder may not be entered
        raise UserError(f"{flag} {path}: {error.strerror}".lstrip()) from error
    except ValueError as error:
        # The path contains a null byte
        raise UserError(f"{flag} {path!r}: {error}".lstrip()) from error
    except RuntimeError:
        home = Path(path).parts[0]
        raise UserError(
            f"{flag} {path}: the home folder of {home} is unknown; write the full path".lstrip()
        ) from None
