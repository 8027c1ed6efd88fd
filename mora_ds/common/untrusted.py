"""Values from a file are only data: each type, name, path, number and size is checked here before it is used.

    plain_json, read_text        bounded in size and depth, before memory is taken
    typed(hint, value, where)    a value of JSON or YAML as a type: a dataclass, list[int], dict[str, FileName], ...
    typed_fully                  the same, where no field may be left to its default
    file_name, relative_path     text of a file that becomes a part of a path
    require_plain(folder)        no symbolic link, pipe or device inside a checkpoint or an adapter
    expanded(path, flag)         a path with ~ in it
    require_memory               sizes that a file states, against the memory that there is

All of them raise `UserError`, whose text begins with `where`: the file, and the place in it.
"""

import json
import os
import re
import resource
import stat
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import psutil

from mora_ds.common.errors import Bounds, UserError, nearest, refusal, unknown

MAX_BYTES = 32 * 2**20
"""Largest JSON file, in bytes. Parsed, it may take 25 times as much memory; the layout of shards with 100,000
parameters has 10 MiB."""
MAX_DEPTH = 64
"""Deepest nesting of JSON."""
MAX_TEXT = 1 << 16
"""Longest text in characters, where it is a value of known meaning."""
MAX_SIDE = 1 << 24
"""Longest side of a layer: far above any vocabulary."""

_WHOLE = Bounds(least=-(2**63), below=2**63)

_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, breaks of lines, and what turns the direction of writing: they would change a whole message."""

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: Any) -> str:
    """`repr` of a value for a message, cut to a line."""
    return _short.repr(value)


# -- text and JSON -----------------------------------------------------------------------------------------------------


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises `UserError` for a larger one and for one that is no text, OSError
    where it cannot be read."""
    if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode) and not _is_of_shell(path):
        raise UserError(f"{path} is no file")  # a pipe would wait for ever
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} is larger than the {limit:,} bytes that such a file may have")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _is_of_shell(path: Path) -> bool:
    """Whether it is a name such as /dev/fd/63, by which a shell gives a pipe. Below /dev/shm lie files as elsewhere."""
    return path == Path("/dev/stdin") or path.parent == Path("/dev/fd")


def parse_json(text: str, **options: Any) -> Any:
    """`json.loads`. Raises ValueError also for brackets that are nested too deeply, and one with a message for users
    for a number that is too long; `json.JSONDecodeError` has the line."""
    try:
        return json.loads(text, **options)
    except (json.JSONDecodeError, UserError):
        raise
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except ValueError:
        raise ValueError(f"a number has more than {sys.get_int_max_str_digits()} digits") from None


def plain_json(text: str, where: object) -> Any:
    """JSON of bounded size and depth, whose texts can be printed and written. Raises `UserError`."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{where} is larger than the {MAX_BYTES:,} characters that such JSON may have")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    _check_values(content, where, depth=1)
    return content


def _check_values(value: Any, where: object, depth: int) -> None:
    """Raises `UserError` where a value lies deeper than `MAX_DEPTH`, and for texts that are no Unicode."""
    if depth > MAX_DEPTH:
        raise UserError(f"{where} is damaged: nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        _require_encodable(value, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _require_encodable(key, where)
            _check_values(item, where, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_values(item, where, depth + 1)


def _require_encodable(text: str, where: object) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} is damaged: {shown(text)} is no Unicode text") from error


# -- typed values ------------------------------------------------------------------------------------------------------


def file_name(text: str, where: str) -> str:
    """`text`, if it can be the name of one file or folder: nothing that leads elsewhere or cannot be printed."""
    if text in ("", ".", "..") or "/" in text or "\\" in text or not text.isprintable():
        raise UserError(f"{where}: {shown(text)} cannot be the name of a file, nor a part of one")
    if len(text.encode()) > 240:
        raise UserError(f"{where}: a name of {len(text)} characters, {shown(text)}, is too long")
    return text


def relative_path(text: str, where: str) -> str:
    """`text`, if it is a path of a file below a folder: a/b/c, each part a `file_name`."""
    for component in text.split("/"):
        file_name(component, f"{where}: {shown(text)}")
    return text


def any_path(text: str, where: str) -> str:
    """`text`, if it can be a path at all, in any script, wherever it leads: it is only read, and what is there is
    compared."""
    if not text or _UNSHOWN.search(text) or len(text.encode()) > 4000 or max(map(len, text.split("/"))) > 255:
        raise UserError(f"{where}: {shown(text)} cannot be a path")
    return text


FileName = Annotated[str, file_name]
"""Names of parameters and modules too: some tools make files of them."""
RelativePath = Annotated[str, relative_path]
AnyPath = Annotated[str, any_path]
Count = Annotated[int, Bounds(least=0, below=2**63)]
Side = Annotated[int, Bounds(least=1, most=MAX_SIDE)]
Processes = Annotated[int, Bounds(least=1, most=1 << 20)]


def typed(hint: Any, value: Any, where: object) -> Any:
    """`value`, checked to be a `hint`; of dataclasses, tuples and enums an instance. Raises `UserError`.

    Hints: dataclasses (from a mapping of their fields), list, tuple and dict of hints, enums (by value), unions with
    None, bool, int (64 bits), float, str, Any; and `Annotated` with `Bounds`, or a function of (value, where) that
    raises. True and False are no numbers.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _annotated(hint, value, where)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in get_args(hint) if argument is not type(None))
        return None if value is None else typed(inner, value, where)
    if is_dataclass(hint):
        return _instance(hint, value, where)
    if origin in (list, tuple):
        return _sequence(hint, value, where)
    if origin is dict:
        return _mapping(hint, value, where)
    if issubclass(hint, Enum):
        known = [member.value for member in hint]
        if not isinstance(value, str) or len(value) > 99 or value not in known:
            value = value if isinstance(value, str) and len(value) < 99 else shown(value)
            raise UserError(f"{where}: {unknown(hint.__name__.removesuffix('Kind').lower(), value, known)}")
        return hint(value)
    return _scalar(hint, value, where)


def _annotated(hint: Any, value: Any, where: object) -> Any:
    inner, *checks = get_args(hint)
    result = typed(inner, value, where)
    for check in checks:
        if not isinstance(check, Bounds):
            check(result, str(where))
        elif not check.allow(result):
            raise UserError(f"{where} must be {check}, got {shown(value)}")
    return result


def _scalar(hint: Any, value: Any, where: object) -> Any:
    kinds = (int, float) if hint is float else hint
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} must be {_NAMES.get(hint, hint.__name__)}, got {shown(value)}")
    if isinstance(value, int) and not _WHOLE.allow(value):
        raise UserError(f"{where}: the number {shown(value)} is out of bounds")
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise UserError(f"{where}: a text of {len(value):,} characters is too long")
        _require_encodable(value, where)
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _sequence(hint: Any, value: Any, where: object) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where} must be a list, got {shown(value)}")
    items = get_args(hint)
    if get_origin(hint) is list or items[-1] is Ellipsis:
        converted = [typed(items[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    elif len(items) != len(value):
        raise UserError(f"{where} must have {len(items)} entries, got {shown(value)}")
    else:
        converted = [typed(*pair, f"{where}[{index}]") for index, pair in enumerate(zip(items, value, strict=True))]
    return converted if get_origin(hint) is list else tuple(converted)


def _mapping(hint: Any, value: Any, where: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping, got {shown(value)}")
    key_hint, value_hint = get_args(hint)
    return {
        typed(key_hint, key, f"{where}: a key"): typed(value_hint, item, f"{where}: {shown(key)}")
        for key, item in value.items()
    }


@lru_cache(maxsize=64)
def _hints(cls: type) -> tuple[dict[str, Any], frozenset[str]]:
    """(hint of each field, names of those without a default)."""
    hints = get_type_hints(cls, include_extras=True)
    of_class = [field for field in fields(cls) if field.init]
    needed = [field.name for field in of_class if field.default is MISSING and field.default_factory is MISSING]
    return {field.name: hints[field.name] for field in of_class}, frozenset(needed)


def _instance(cls: Any, value: Any, where: object) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping, got {shown(value)}")
    hints, needed = _hints(cls)
    for key in value:
        if key not in hints:
            raise UserError(f"{where}: unknown key {shown(key)}.{nearest(str(key)[:99], hints)}")
    if missing := sorted(needed - value.keys()):
        raise UserError(f"{where}: {missing[0]!r} is missing")
    arguments = {name: typed(hints[name], item, f"{where}: {name}") for name, item in value.items()}
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def typed_fully(cls: Any, value: Any, where: object) -> Any:
    """As `typed`, of a dataclass that mora_ds has written: also a field with a default must be there."""
    instance = typed(cls, value, where)
    if missing := [name for name in _hints(cls)[0] if name not in value]:
        raise UserError(f"{where}: {missing[0]!r} is missing")
    return instance


def wrong_types(settings: Any) -> Iterator[str]:
    """One message for each field of a dataclass whose value is not of its type, named as the field."""
    for name, hint in _hints(settings.__class__)[0].items():
        yield from refusal(typed, hint, getattr(settings, name), name)


def entry(content: dict[str, Any], key: str, hint: Any, where: object) -> Any:
    """`content[key]` as a `hint`. Raises `UserError`, also where there is no such key."""
    if key not in content:
        raise UserError(f"{where} is damaged: {key!r} is missing")
    return typed(hint, content[key], f"{where} is damaged: {key}")


# -- folders and memory ------------------------------------------------------------------------------------------------


def links(folder: Path) -> list[str]:
    """A message for every link, pipe, socket and device under `folder`, by its own path; links are not followed."""
    problems = []

    def note(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be read: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=note):
        for path in sorted(Path(parent, name) for name in (*folders, *names)):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                problems.append(f"{path} is a link to {path.readlink()}, and links are not followed")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                problems.append(f"{path} is neither a file nor a folder")
    return problems


def require_plain(folder: Path) -> None:
    """Raises `UserError` where `folder`, a checkpoint or an adapter, has anything in it but files and folders."""
    if problems := links(folder):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}: make a copy that holds the files themselves (cp -rL)")


def expanded(path: str | Path, flag: str = "") -> Path:
    """`path` with the home folder in place of ~ or ~USER. Raises `UserError` naming `flag` where that is not known, and
    where the disk does not let one look whether anything is there."""
    try:
        place = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            place.stat()
        return place
    except OSError as error:  # a name that is too long, a loop of links, a folder that may not be entered
        raise UserError(f"{flag} {path}: {error.strerror}".lstrip()) from error
    except ValueError as error:  # a byte of zero
        raise UserError(f"{flag} {path!r}: {error}".lstrip()) from error
    except RuntimeError:
        home = Path(path).parts[0]
        raise UserError(f"{flag} {path}: no home folder is known for {home}; write the path itself".lstrip()) from None


def require_memory(nbytes: int, what: str) -> None:
    """Raises `UserError` where this machine, or this process by its limit, has fewer bytes left than `what` takes."""
    free = psutil.virtual_memory().available
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free = min(free, limit - psutil.Process().memory_info().vms)
    if nbytes > free:
        raise UserError(f"{what} takes {nbytes / 2**30:,.1f} GiB of memory, and {max(free, 0) / 2**30:,.1f} are free")
