"""The user's text as a `Corpus`.

    --train_files 'corpus/*.jsonl' notes.md folder/    FileMember, ...   in the order of the flag, each pattern sorted
    --train_files 'corpus/*.bin'                       TokenFile, ...    of other tools
    --dataset_name NAME                                DatasetMember

A corpus can be read repeatedly. It is never copied; only its token cache is written.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mora_ds.common.errors import UserError, nearest, reason
from mora_ds.common.untrusted import is_url
from mora_ds.data.held_out import DocumentFilter
from mora_ds.data.members import (
    DatasetMember,
    FileMember,
    Member,
    StreamedDatasetMember,
)
from mora_ds.data.readers import (
    START,
    TOKENS,
    Document,
    check_column,
    file_kind,
    has_known_suffix,
)
from mora_ds.data.remote_files import remote_members, tokens_on_disk
from mora_ds.data.token_files import TokenFile

TOKEN_INDICES = (".idx", ".ds.index", ".ds.metadata")

SPLIT = "train"
"""The split of a dataset that is read."""


@dataclass(frozen=True)
class Corpus:
    """The documents of one named source. Iterating reads them from disk."""

    members: tuple[Member, ...]
    text_column: str = "text"
    flag: str = "--train_files"
    """The flag named in error messages."""
    keep: DocumentFilter | None = None
    """Selects the documents of the corpus; None for all."""

    def __iter__(self) -> Iterator[Document]:
        for member in self.members:
            documents = self.documents_of(member)
            yield from documents if self.keep is None else self.keep(documents)

    def __str__(self) -> str:
        others = len(self.members) - 1
        return f"{self.members[0].label}{f' and {others} more' if others else ''}"

    @property
    def is_tokenized(self) -> bool:
        """Whether the members are token files. Raises `UserError` if only some are."""
        kinds = {isinstance(member, TokenFile) for member in self.members}
        if len(kinds) > 1:
            raise UserError(
                f"{self.flag}: text and token files cannot be one source; name them as two (NAME=FILES:WEIGHT)"
            )
        return kinds == {True}

    def documents_of(self, member: Member) -> Iterator[Document]:
        """All documents of one member, without applying `keep`."""
        with _errors_with_flag(self.flag):
            yield from (document for document, _ in member.documents_after(START))

    def texts(self) -> Iterator[str]:
        """The texts without positions, for training a tokenizer."""
        return (document.text for document in self)

    def size_bytes(self) -> int:
        """Size on disk (of compressed files the compressed size)."""
        return sum(member.size_bytes() for member in self.members)


@contextmanager
def _errors_with_flag(flag: str) -> Iterator[None]:
    """A context that prefixes the message of a `UserError` with the flag."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def load_corpus(
    patterns: Sequence[str] = (),
    *,
    dataset_name: str | None = None,
    streaming: bool = False,
    text_column: str = "text",
    flag: str = "--train_files",
) -> Corpus:
    """One corpus from files (by name, pattern or folder) or from a `datasets` name (on
    the Hub, or a folder on disk).

    `streaming`: read a dataset of the Hub over the network on every pass. Checks only
    names, sizes and the first document of every member; the rest is checked when it is
    read. Raises `UserError` that names `flag` or `--dataset_name` for invalid input.
    """
    # Any other flag is the name of a source of a mixture.
    if dataset_name is not None and flag == "--train_files":
        flag = "--dataset_name"
    with _errors_with_flag(flag):
        if dataset_name is None:
            members = _file_members(patterns, text_column)
        else:
            members = [_dataset_member(dataset_name, text_column, streaming)]
    corpus = Corpus(tuple(members), text_column, flag)
    if corpus.is_tokenized:
        return corpus
    for member in corpus.members:
        next(corpus.documents_of(member))
    return corpus


# -- files -----------------------------------------------------------------------------


def _file_members(patterns: Sequence[str], text_column: str) -> list[Member]:
    """The files on disks and at URLs, in the order of the patterns, without
    duplicates."""
    members: list[Member] = []
    for at_url, group in groupby(map(tokens_on_disk, patterns), is_url):
        if at_url:
            for pattern in group:
                members += remote_members(pattern, text_column)
        else:
            files = resolve_files(list(group))
            members += [_file_member(path, text_column) for path in files]
    return list({member.label: member for member in members}.values())


def resolve_files(patterns: Sequence[str]) -> list[Path]:
    """Files in the order of the patterns, sorted within each, without duplicates.

    A folder matches all files in it with a known suffix. Empty files are skipped if a
    pattern or folder matched them, but not if they were named. Raises `UserError` for a
    pattern without a match.
    """
    paths: dict[str, Path] = {}
    for pattern in patterns:
        matches = [path for match in _matches(pattern) for path in _expand(match)]
        if not matches:
            raise UserError(f"no file matches {pattern!r}.{_hint(pattern)}")
        if matches != [Path(os.path.expanduser(pattern))]:
            matches = [path for path in matches if not _is_empty(path)] or matches
        for path in matches:
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def _matches(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):  # a name with [ or * in it is taken literally
        return [Path(pattern)]
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        raise UserError(
            f"{path} is a dataset saved by the package datasets: name it with --dataset_name"
        )
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = (
            Path(folder) / name for name in sorted(names) if not name.startswith(".")
        )
        files += [file for file in inside if has_known_suffix(file)]
    return files


def _hint(pattern: str) -> str:
    _, equals, files = pattern.partition("=")
    if equals and _matches(files):
        return f" A named source also needs a weight: {pattern}:1"
    if os.path.isdir(os.path.expanduser(pattern)):
        return " The folder holds no file of a known format; for a saved dataset use --dataset_name."
    folder = Path(os.path.expanduser(pattern)).parent
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return nearest(Path(pattern).name, names)


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _file_member(path: Path, text_column: str) -> Member:
    file_kind(path)
    # Text is read several times: a pipe would lose its first part, or block forever.
    if not path.is_file():
        raise UserError(
            f"{path} is not a regular file (a pipe, a device, a broken link); text is read more than once"
        )
    if path.name.endswith(TOKEN_INDICES):
        raise UserError(f"{path} belongs to a token file: name the .bin or .ds alone")
    if file_kind(path) != TOKENS:
        return FileMember(path, text_column)
    file = TokenFile(path, text_column)
    if file.index is not None and not file.index.path.is_file():
        raise UserError(
            f"{path} is a file of tokens, and its index {file.index.path} is missing"
        )
    return file


# -- datasets --------------------------------------------------------------------------


def _dataset_member(name: str, text_column: str, streaming: bool) -> Member:
    """A folder saved by `datasets`, which is memory-mapped, or a name on the Hub."""
    # Imported here, because it is slow and most runs read files.
    import datasets

    has_splits = Path(name, "dataset_dict.json").is_file()
    try:
        if has_splits or Path(name, "state.json").is_file():
            dataset = datasets.load_from_disk(Path(name, SPLIT) if has_splits else name)
        else:
            dataset = datasets.load_dataset(name, split=SPLIT, streaming=streaming)
    # A dataset's code and the network can raise any error.
    except Exception as error:
        raise UserError(
            f"{name!r} (split {SPLIT!r}) cannot be loaded: {reason(error)}"
        ) from error
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedDatasetMember(name, dataset, text_column)
    check_column(dataset.features.arrow_schema, text_column, name)
    return DatasetMember(name, dataset, text_column)
