"""Crash-safe files and folders: atomic writes, links, manifests with hashes; checked
reading of JSON and YAML.

    write a hidden file or folder next to the target -> fsync -> rename over the target ->
    fsync the parent folder

If the process is killed at any time, a reader finds either the complete old content or
the complete new content.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml

from mora_ds.common.errors import RunError, UserError, reason
from mora_ds.common.untrusted import (
    Count,
    RelativePath,
    entry,
    links,
    open_file,
    plain_json,
    read_text,
    require_plain,
    shown,
)
from mora_ds.common.version import __version__

Result = TypeVar("Result")

FORMAT = 6
"""Format version of the files that are read again: checkpoints, ledgers, adapters."""

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object."""

MANIFEST = "manifest.json"
"""Sizes and hashes of all other files of a folder."""

CONFIGS = Path(__file__).parent / "configs"
"""Recipes and configs: in a checkout a link to configs/, in a wheel a folder."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_WRITE_REFUSED = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.EFBIG,
    errno.ENOLCK,
    errno.ENOSYS,
)
"""Errors of a file system that became read-only or lost its server, of `ulimit -f`, and
of one without locks."""

_IN_MESSAGE = re.compile(r"\(os error (\d+)\)")
"""The errno in error messages of tokenizers and safetensors."""


def config_names(folder: str = "") -> list[str]:
    """Paths below configs/ of the packaged recipes and configs in `folder`, sorted."""
    files = (CONFIGS / folder).rglob("*")
    paths = [path for path in files if path.suffix in (".json", ".yaml")]
    return sorted(path.relative_to(CONFIGS).as_posix() for path in paths)


def config_path(name: str) -> Path:
    """The packaged file of a name such as "zero3", "models/llama3_8b" or
    "recipes/continual". Raises `UserError` that lists all names."""
    for path in config_names():
        if name == path.rpartition(".")[0]:
            return CONFIGS / path
    raise UserError(
        f"config_path: no packaged config {name!r}; there are {', '.join(config_names())}"
    )


def packaged(path: str) -> str:
    """`path`, or the packaged file if configs/ is not in the working directory."""
    packaged = CONFIGS.parent / path
    if path.startswith("configs/") and packaged.is_file() and not Path(path).exists():
        return str(packaged)
    return path


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A context that converts errors of a full disk or quota, and of a disk that is not
    writable, to a `RunError` that names `folder`. Other errors are unchanged."""
    try:
        yield
    except (RunError, UserError):
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if named := _IN_MESSAGE.search(str(error)):
            number = int(named[1])
        if number in DISK_FULL:
            raise RunError(
                f"the disk that holds {folder} is full: {os.strerror(number)}"
            ) from error
        if number in _WRITE_REFUSED:
            raise RunError(f"writing to {folder} failed: {error}") from error
        raise


@contextmanager
def writable(flag: str, folder: Path) -> Iterator[None]:
    """A context that raises `RunError` for a full disk, and for any other `OSError`,
    such as of a read-only disk, a `UserError` that names the flag and its folder."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        if error.errno in DISK_FULL:
            raise RunError(f"the disk that holds {folder} is full: {why}") from error
        raise UserError(f"{flag} {folder} cannot be written to: {why}") from error


def fsync(path: Path) -> None:
    """Flush a file, or the renames inside a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path, with_files: bool = True) -> None:
    """Flush `folder` and every folder under it, so that their entries are on disk, and
    `with_files` also all files."""
    for parent, _, names in os.walk(folder, topdown=False):
        paths = [Path(parent, name) for name in names] if with_files else []
        for path in paths:
            if not path.is_symlink():
                fsync(path)
        fsync(Path(parent))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A context that yields a temporary file, which replaces `path` if the block
    succeeds."""
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path.parent):
        # A file left by a killed process may be a hard link: never write into it
        temporary.unlink(missing_ok=True)
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def write_json_atomic(path: Path, content: Any) -> None:
    """Write UTF-8 JSON atomically. Raises `RunError` on a full disk."""
    with atomic_path(path) as temporary:
        write_json(temporary, content)


def write_json(path: Path, content: Any) -> None:
    """Writes UTF-8 JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> JsonObject:
    """The JSON object in `path`. Raises `UserError` that names the file if it is
    missing, damaged or not an object."""
    try:
        content = plain_json(read_text(path), path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is damaged: a JSON object was expected, not {type(content).__name__}"
        )
    return content


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stat_signature(path: Path) -> tuple[int, int, int] | None:
    """Stat signature of a file: size, modification time (nanoseconds) and inode. None if
    there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def replace_symlink(link: Path, target: str) -> None:
    """Make `link` point to `target`, relative to its folder, by one atomic rename."""
    temporary = link.with_name(f".{link.name}.partial")
    temporary.unlink(missing_ok=True)
    with disk_errors(link.parent):
        temporary.symlink_to(target)
        os.replace(temporary, link)
    fsync(link.parent)


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """A context that locks `folder`, so that `is_abandoned` is false in other processes.
    The lock ends with the process. Has no effect on a file system without locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_abandoned(folder: Path) -> bool:
    """Whether `folder` is not empty and no process is `at_work` in it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        # It is no folder, or gone
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return any(folder.iterdir())
    except OSError:
        # The folder is locked, or the file system has no locks
        return False
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Atomically make `target` a hard link of `source`, or a copy."""
    # rename(2) between two links of one file does nothing
    if target.exists() and os.path.samefile(source, target):
        return
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            shutil.copyfile(source, temporary)


def copy_folder(source: Path, target: Path) -> None:
    """Copy all files with their times, but without their modes. Raises `UserError` for a
    link in `source` and `RunError` on a full disk (`shutil.copytree` has another
    error)."""
    require_plain(source)
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.rglob("*")):
            relative = path.relative_to(source)
            if path.is_dir():
                (target / relative).mkdir()
            else:
                shutil.copyfile(path, target / relative)
                os.utime(
                    target / relative,
                    ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns),
                )


def as_path(value: Any, argument: str) -> Path:
    """An argument of a public function as a path. Raises `UserError` that starts with
    `argument` for other values, including an empty string."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path:
        raise UserError(f"{argument} must be a path, got {value!r}")
    if "://" in path:
        raise UserError(
            f"{argument}: URLs are not supported; give a path on a disk, got {path}"
        )
    return Path(path)


def named_path(entry: str) -> tuple[str, str]:
    """(name, path or pattern) of NAME=PATH or PATH. The name of PATH is that of its
    file."""
    name, mark, path = entry.partition("=")
    if mark and "/" not in name:
        return name, path
    return Path(entry).name.split(".")[0], entry


def require_place(output: Path) -> None:
    """Raise `UserError` if no folder can be created at `output`: below a file, in a
    folder that is not writable, or with an invalid name."""
    try:
        output.exists()
        parent = next(folder for folder in output.absolute().parents if folder.exists())
    except OSError as error:
        raise UserError(
            f"`output` {output} cannot be made: {error.strerror}"
        ) from error
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise UserError(
            f"`output` {output} cannot be made: {parent} is no folder that you can write to"
        ) from error


def require_new(output: Path) -> None:
    """Raise `UserError` unless `output` can be created or is an empty folder."""
    require_place(output)
    is_empty = output.is_dir() and not any(output.iterdir())
    if output.is_symlink() or (output.exists() and not is_empty):
        raise UserError(f"`output` {output} exists already; name a new folder")


def require_outside(output: Path, source: Path) -> None:
    """Raise `UserError` if `output` is inside of `source`, a checkpoint or an adapter,
    because it would be deleted with it."""
    if source.resolve() in output.resolve().parents:
        raise UserError(
            f"`output` {output} lies in the checkpoint; give another folder"
        )


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A context that yields an empty temporary folder, which replaces `folder` if the
    block succeeds.

    An existing `folder` is first renamed, and deleted when the new one is in place.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    with disk_errors(folder.parent):
        if old.exists() and not folder.exists():
            # The previous process was killed between the two renames
            os.rename(old, folder)
        for leftover in (old, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            fsync_tree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def facts_of(file: Path) -> JsonObject:
    """What a manifest records of a file: its size and sha256."""
    return {"size": file.stat().st_size, "sha256": sha256_file(file)}


def manifest_of(files: Mapping[str, JsonObject]) -> JsonObject:
    """The content of `manifest.json` for {relative path: size and sha256}."""
    return {"format": FORMAT, "files": files, "seal": json_digest(files)}


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: size and sha256 of every file under `folder`."""
    names = [name for name in file_sizes(folder) if name != MANIFEST]
    for name in names:
        fsync(folder / name)
    files = {name: facts_of(folder / name) for name in names}
    with atomic_path(folder / MANIFEST) as temporary:
        write_compact_json(temporary, manifest_of(files))


def write_compact_json(path: Path, content: Any) -> None:
    """Write JSON without indents, for which Python takes three times as long."""
    path.write_text(json.dumps(content, sort_keys=True))


def file_sizes(folder: Path) -> dict[str, int]:
    """{relative path: bytes} of every file below `folder`, without links."""
    sizes = {}
    # A checkpoint of thousands of ranks has as many files: one look at each folder
    for parent, _, names, descriptor in os.fwalk(folder):
        prefix = f"{parent}/".removeprefix(f"{folder}/")
        for name in names:
            # Another node may rename a file after it was listed
            with suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    sizes[f"{prefix}{name}"] = status.st_size
    return sizes


VISIBLE_WITHIN_S = 20.0
"""How long a network file system may take to show a new file on other nodes."""


def await_file(path: Path, size: int) -> None:
    """Wait until a file that another node has written is visible with this size. Raises
    `RunError` after `VISIBLE_WITHIN_S`."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while problem := file_problem(path, size, None):
        if time.monotonic() > deadline:
            raise RunError(
                f"{problem} on {platform.node()}, {VISIBLE_WITHIN_S:.0f} s after another rank has written it"
            )
        time.sleep(0.1)


def json_digest(content: Any) -> str:
    """Hex sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_manifest(folder: Path, read: Collection[str] | None = None) -> list[str]:
    """One message for each file of `folder` that differs from the manifest. Files that
    are not in the manifest are ignored. `read`: files and folders whose hashes are
    compared; None: all. For others only existence and size are checked. Raises
    `UserError` for a missing or damaged manifest."""
    path = folder / MANIFEST
    content = read_formatted(path)
    # A truncated or edited list has another digest
    listed_content = entry(content, "files", JsonObject, path)
    if content.get("seal") != json_digest(listed_content):
        return [f"{path} is damaged: it does not list what it was written with"]
    if problems := links(folder):
        return problems

    def problem(name: str, facts: FileFacts) -> str:
        is_read = read is None or name.split("/")[0] in read
        return file_problem(
            folder / name, facts.size, facts.sha256 if is_read else None
        )

    listed = listed_files(folder)
    # In threads, because hashing and reading release the GIL
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(filter(None, pool.map(problem, listed.keys(), listed.values())))


@dataclass(frozen=True)
class FileFacts:
    """An entry of a manifest."""

    size: Count
    sha256: str


def listed_files(folder: Path) -> dict[str, FileFacts]:
    """{relative path: facts} from the manifest of `folder`. All paths are inside of the
    folder. Does not compare the facts with the files; see `verify_manifest`. Raises
    `UserError` for a missing or damaged manifest."""
    path = folder / MANIFEST
    return entry(read_json(path), "files", dict[RelativePath, FileFacts], path)


def file_problem(path: Path, size: int, sha256: str | None) -> str:
    """A message if the file is missing or differs, else "". `sha256` None: compare only
    sizes."""
    if path.is_symlink() or not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size:,} bytes instead of {size:,}"
    if sha256 is not None and sha256_file(path) != sha256:
        return f"{path} is damaged: its sha256 is not the one recorded"
    return ""


@contextmanager
def malformed(path: Path) -> Iterator[None]:
    """A context that converts errors of reading unexpected fields to a `UserError` that
    names the file."""
    try:
        yield
    except OtherFormat:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except RunError:
        raise
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise UserError(f"{path} is damaged: {shown(error)}") from error


def read_formatted(path: Path) -> JsonObject:
    """The JSON object in a file of mora_ds, without its key "format". Raises `UserError`
    for another format version."""
    content = read_json(path)
    pop_format(path, content)
    return content


class OtherFormat(UserError):
    """A file is of another version's format: it is not damaged, and nothing can be done
    about it with this version."""


def pop_format(path: Path, content: JsonObject) -> None:
    """Check and remove the key "format" of the content of a file. Raises `OtherFormat` for
    another format version."""
    if (file_format := content.pop("format", None)) != FORMAT:
        raise OtherFormat(
            f"{path} has format {shown(file_format)}; mora_ds {__version__} reads format {FORMAT} alone: go on with "
            "the version that wrote it, or export the model with that one and begin a new run from it"
        )


_MAX_YAML = 2**20
"""Bytes. To parse them takes some ten seconds at most, and 1,000 sources take a third."""
_MAX_DIGITS = 200
"""The largest float has 309 digits; Python parses at most 4,300."""


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader that rejects aliases, which can expand to any number of values; long
    integers; and duplicate keys, of which YAML silently keeps the last one. 1:30:00 is
    text, as in YAML 1.2, not 5,400."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _yaml_error(
                "aliases are not supported: write the value again", self.peek_event()
            )
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> Any:
        if ":" in node.value:
            return node.value
        if len(node.value) > _MAX_DIGITS:
            raise _yaml_error(
                f"a whole number has more than {_MAX_DIGITS} digits", node
            )
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> Any:
        return node.value if ":" in node.value else super().construct_yaml_float(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float)):
                raise _yaml_error(f"{key!r} is not a valid key", key_node)
            # Keys may be converted to strings, so 1 and "1" are the same key.
            if key in seen or str(key) in seen:
                raise _yaml_error(f"{key!r} is given twice", key_node)
            seen |= {key, str(key)}
        return super().construct_mapping(node, deep)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", getattr(_PlainLoader, f"construct_yaml_{_kind}")
    )


def _yaml_error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """`at`: a node or event."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def load_yaml(path: str, what: str) -> dict[Any, Any]:
    """The mapping in a YAML file of at most 1 MiB, without aliases and duplicate keys.
    Raises `UserError`. `what`: a name of the file for messages."""
    try:
        text = read_text(Path(os.path.expanduser(path)), _MAX_YAML)
    except (OSError, UserError) as error:
        raise UserError(f"cannot read {what} {path}: {error}") from error
    try:
        content = yaml.load(text, _PlainLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        # An impossible date or number, or a key that is a list
        raise UserError(f"{path} is not valid YAML: {reason(error)}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(
            f"{path} must contain `key: value` lines, not a {type(content).__name__}"
        )
    return content or {}
