"""What the user names (files, globs, folders, a `datasets` name) -> a `Corpus`, which is read as often as needed.

    --train_files 'corpus/*.jsonl' notes.md folder/    ->  FilePart, FilePart, ...   in the order given, sorted within
    --dataset_name NAME                                ->  DatasetPart

A part is one file or one dataset: it knows its contents' hash and reads its own documents, one at a time. Nothing is
copied: the only thing written from a corpus is its token cache.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mora_ds.data.held_out import DocumentFilter
from mora_ds.data.prepared import PreparedPart, is_prepared, open_prepared
from mora_ds.data.readers import (
    START,
    Document,
    Mark,
    check_column,
    file_kind,
    has_known_suffix,
    is_packed,
    read_documents,
    read_marked,
    text_field,
)
from mora_ds.errors import UserError, nearest
from mora_ds.files import sha256_file


@dataclass(frozen=True)
class IterablePart:
    """A `datasets.IterableDataset`; its own state, after any row, is the mark behind it."""

    label: str
    dataset: Any
    text_column: str

    def documents(self) -> Iterator[Document]:
        return (document for document, _ in self.marked(START))

    def marked(self, mark: Mark) -> Iterator[tuple[Document, Mark]]:
        rows = copy.deepcopy(self.dataset)  # two readers of one dataset would share its state
        rows.load_state_dict(mark.state)
        number = mark.record
        for row in rows:
            number += 1
            where = f"{self.label}, row {number}"
            yield Document(text_field(row, self.text_column, where), where), Mark(number, 0, rows.state_dict())
        if number == 0:
            raise UserError(f"{self.label} is empty: it holds no row")

    def content_hash(self) -> str:
        raise AssertionError("a stream is not hashed")

    def stamp(self) -> dict[str, Any]:
        return {"dataset": self.label}

    def size_bytes(self) -> int:
        return 0


def stream_dataset(name: str, text_column: str, flag: str, split: str = "train") -> Corpus:
    """The rows of a `datasets` name. Raises `UserError`, which names `flag`, where there is none, or no text in it."""
    import datasets  # here, not above: it is slow to import and most runs read files

    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{flag}: {name!r} (split {split!r}) cannot be streamed: {error}") from error
    part = IterablePart(name, rows, text_column)
    corpus = Corpus((part,), text_column, flag)
    next(corpus.documents_of(part))
    return corpus


class Part(Protocol):
    """One file or dataset of a corpus. Parts are pickled to worker processes."""

    @property
    def label(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...

    def marked(self, mark: Mark) -> Iterator[tuple[Document, Mark]]:
        """The documents behind `mark`, each with the mark behind it."""
        ...

    def content_hash(self) -> str:
        """Changes whenever the contents do; the same contents elsewhere have the same hash."""
        ...

    def stamp(self) -> dict[str, Any]:
        """What is cheap to look at and changes with the contents: while it stays, the hash is not taken again."""
        ...

    def size_bytes(self) -> int: ...


@dataclass(frozen=True)
class FilePart:
    path: Path
    text_column: str

    @property
    def label(self) -> str:
        return str(self.path)

    def documents(self) -> Iterator[Document]:
        return read_documents(self.path, self.text_column)

    def marked(self, mark: Mark) -> Iterator[tuple[Document, Mark]]:
        return read_marked(self.path, self.text_column, mark)

    def content_hash(self) -> str:
        content = f"{file_kind(self.path).value} {is_packed(self.path)} {sha256_file(self.path)}"
        return hashlib.sha256(content.encode()).hexdigest()

    def stamp(self) -> dict[str, Any]:
        status = self.path.stat()
        return {"path": str(self.path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}

    def size_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class DatasetPart:
    label: str
    dataset: Any
    """A map-style `datasets.Dataset`; it stays on disk and is read batch by batch."""
    text_column: str

    def documents(self) -> Iterator[Document]:
        return (document for document, _ in self.marked(START))

    def marked(self, mark: Mark) -> Iterator[tuple[Document, Mark]]:
        row, rows = mark.record, self.dataset.select_columns([self.text_column])
        for batch in rows.select(range(row, len(rows))).iter(batch_size=1024):
            for text in batch[self.text_column]:
                row += 1
                if text is None:
                    raise UserError(f"{self.label}, row {row}: the text is null")
                yield Document(text, f"{self.label}, row {row}"), Mark(row)
        if row == 0:
            raise UserError(f"{self.label} is empty: it holds no row")

    def content_hash(self) -> str:
        return hashlib.sha256(self.dataset._fingerprint.encode()).hexdigest()

    def stamp(self) -> dict[str, Any]:
        return {"dataset": self.label, "fingerprint": self.dataset._fingerprint}

    def size_bytes(self) -> int:
        return int(self.dataset.data.nbytes)


@dataclass(frozen=True)
class Corpus:
    """Documents of one named source. Iterating reads them from disk; `flag` is what its error messages name."""

    parts: tuple[Part, ...]
    text_column: str = "text"
    flag: str = "--train_files"
    keep: DocumentFilter | None = None
    """Which documents count; None for all."""

    def __iter__(self) -> Iterator[Document]:
        for part in self.parts:
            documents = self.documents_of(part)
            yield from documents if self.keep is None else self.keep(documents)

    def documents_of(self, part: Part) -> Iterator[Document]:
        """All documents of one part, whatever `keep` says."""
        try:
            yield from part.documents()
        except UserError as error:
            raise UserError(f"{self.flag}: {error}") from error

    @property
    def prepared(self) -> PreparedPart | None:
        """The tokens that this corpus is, where it is a folder that `prepare_corpus` has written."""
        return next((part for part in self.parts if isinstance(part, PreparedPart)), None)

    def texts(self) -> Iterator[str]:
        """The bare texts, for training a tokenizer."""
        return (document.text for document in self)

    def size_bytes(self) -> int:
        """Size on disk, compressed where the files are."""
        return sum(part.size_bytes() for part in self.parts)


def load_corpus(
    patterns: Sequence[str] = (),
    *,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str = "text",
    flag: str = "--train_files",
) -> Corpus:
    """Files by name, glob or folder, or a `datasets` name (of the hub, or a folder on disk), as one corpus.

    Looks at names, sizes and the first document of every part only; the rest is checked while it is read.
    Raises `UserError`, which names `flag` or `--dataset_name`, for anything that is no corpus.
    """
    if bool(patterns) == bool(dataset_name):
        raise UserError(f"give either {flag} or --dataset_name" + (", not both" if patterns else ""))
    parts: tuple[Part, ...]
    if dataset_name:
        flag, parts = "--dataset_name", (_named_dataset(dataset_name, dataset_config, dataset_split, text_column),)
    else:
        parts = tuple(_file_part(path, text_column, flag) for path in resolve_files(patterns, flag))
    corpus = Corpus(parts, text_column, flag)
    if corpus.prepared is not None:
        if len(parts) > 1:
            raise UserError(
                f"{flag}: {corpus.prepared.label} holds tokens and must be named alone, without other files"
            )
        return corpus
    for part in parts:
        next(corpus.documents_of(part))
    return corpus


def resolve_files(patterns: Sequence[str], flag: str = "--train_files") -> list[Path]:
    """Files (and folders that `datasets` saved) in the order of the patterns, sorted within each, each once.

    A folder stands for all files within that have a known suffix. Raises `UserError` for a pattern without a match.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = [path for match in _matches(pattern) for path in _expand(match)]
        if not matches:
            raise UserError(f"{flag}: no file matches {pattern!r}.{_near_files(pattern)}")
        for path in matches:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _matches(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):  # a name with [ or * in it is taken as it stands
        return [Path(pattern)]
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]


def _expand(path: Path) -> list[Path]:
    if not path.is_dir() or is_saved_dataset(path) or is_prepared(path):
        return [path]
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = (Path(folder) / name for name in sorted(names) if not name.startswith("."))
        files += [file for file in inside if has_known_suffix(file)]
    return files


def _near_files(pattern: str) -> str:
    _, equals, files = pattern.partition("=")
    if equals and _matches(files):
        return f" A source that has a name has a weight, too: {pattern}:1"
    folder = Path(pattern).expanduser().parent
    if not folder.is_dir():
        return f" There is no folder {str(folder)!r}." if not glob.has_magic(str(folder)) else ""
    return nearest(Path(pattern).name, sorted(os.listdir(folder)))


def _file_part(path: Path, text_column: str, flag: str) -> Part:
    if path.is_dir() and is_prepared(path):
        try:
            return open_prepared(path)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from None
    if path.is_dir():
        return _dataset_part(str(path), _saved_dataset(path, "train", flag), text_column, flag)
    try:
        file_kind(path)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    if path.stat().st_size == 0:
        raise UserError(f"{flag}: {path} is empty")
    return FilePart(path, text_column)


# -- datasets ------------------------------------------------------------------------------------------------------
def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` has saved it, to be mapped as it is."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _named_dataset(name: str, config: str | None, split: str, text_column: str) -> DatasetPart:
    import datasets  # here, not above: it is slow to import and most runs read files

    if is_saved_dataset(Path(name)):
        return _dataset_part(name, _saved_dataset(Path(name), split, "--dataset_name"), text_column, "--dataset_name")
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        wanted = f"split {split!r}" + (f", configuration {config!r}" if config else "")
        raise UserError(f"--dataset_name {name!r} ({wanted}) cannot be loaded: {error}") from error
    return _dataset_part(name, dataset, text_column, "--dataset_name")


def _saved_dataset(folder: Path, split: str, flag: str) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{flag}: {folder} is no folder that datasets.save_to_disk has written: {error}") from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(f"{flag}: {folder} has no split {split!r}; there are: {', '.join(dataset)}")
    return dataset[split]


def _dataset_part(label: str, dataset: Any, text_column: str, flag: str) -> DatasetPart:
    try:
        check_column(dataset.features.arrow_schema, text_column, label)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    return DatasetPart(label, dataset, text_column)
