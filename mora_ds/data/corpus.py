"""What the user names (files, patterns, folders, a `datasets` name) as a `Corpus`, which can be read again and again.

    --train_files 'corpus/*.jsonl' notes.md folder/    FileMember, ...   in the order given, each pattern sorted
    --dataset_name NAME                                DatasetMember

Nothing is copied: the only thing written from a corpus is its token cache.
"""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_ds.common.errors import UserError, nearest
from mora_ds.data.held_out import DocumentFilter
from mora_ds.data.members import DatasetMember, FileMember, Member, StreamedDatasetMember
from mora_ds.data.readers import Document, check_column, file_kind, has_known_suffix

logger = logging.getLogger(__name__)

SPLIT = "train"
"""The split of a data set that is read."""


@dataclass(frozen=True)
class Corpus:
    """The documents of one named source. Iterating reads them from disk."""

    members: tuple[Member, ...]
    text_column: str = "text"
    flag: str = "--train_files"
    """The flag that its error messages name."""
    keep: DocumentFilter | None = None
    """Which documents belong to the corpus; None for all."""

    def __iter__(self) -> Iterator[Document]:
        for member in self.members:
            documents = self.documents_of(member)
            yield from documents if self.keep is None else self.keep(documents)

    def documents_of(self, member: Member) -> Iterator[Document]:
        """All documents of one member, whatever `keep` says."""
        with _naming(self.flag):
            yield from member.documents()

    def texts(self) -> Iterator[str]:
        """The texts alone, for training a tokenizer."""
        return (document.text for document in self)

    def size_bytes(self) -> int:
        """Size on disk, compressed where the files are."""
        return sum(member.size_bytes() for member in self.members)


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Puts the flag before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def load_corpus(
    patterns: Sequence[str] = (),
    *,
    dataset_name: str | None = None,
    text_column: str = "text",
    flag: str = "--train_files",
) -> Corpus:
    """Files by name, pattern or folder, or a `datasets` name (of the hub, or a folder on disk), as one corpus.

    Looks at names, sizes and the first document of every member only; the rest is checked while it is read.
    Raises `UserError`, which names `flag` or `--dataset_name`, for anything that is no corpus.
    """
    if bool(patterns) == bool(dataset_name):
        raise UserError(f"give either {flag} or --dataset_name" + (", not both" if patterns else ""))
    if dataset_name:
        flag = "--dataset_name" if flag == "--train_files" else flag  # else a source of a mixture
        dataset = _saved_dataset if is_saved_dataset(Path(dataset_name)) else _named_dataset
        with _naming(flag):
            members: tuple[Member, ...] = (_dataset_member(dataset_name, dataset(dataset_name), text_column),)
    else:
        files = resolve_files(patterns, flag)
        with _naming(flag):
            members = tuple(_file_member(path, text_column) for path in files)
    corpus = Corpus(members, text_column, flag)
    for member in members:
        next(corpus.documents_of(member))
    return corpus


def stream_dataset(name: str, text_column: str, flag: str) -> Corpus:
    """The rows of a `datasets` name, read over the network while training.

    Raises `UserError`, which names `flag`, where there is no such dataset, or no text in it.
    """
    with _naming(flag):
        member = StreamedDatasetMember(
            name,
            _named_dataset(name, streaming=True),
            text_column,
        )
    corpus = Corpus((member,), text_column, flag)
    next(corpus.documents_of(member))
    return corpus


# -- files ---------------------------------------------------------------------------------------------------------


def resolve_files(patterns: Sequence[str], flag: str = "--train_files") -> list[Path]:
    """Files (and folders that `datasets` saved) in the order of the patterns, sorted within each, without repeats.

    A folder stands for all files within it that have a known suffix. Files of no bytes are left out where a pattern or
    a folder has found them, but not where they are named. Raises `UserError` for a pattern without a match.
    """
    paths: dict[str, Path] = {}
    for pattern in patterns:
        matches = [path for match in _matches(pattern) for path in _expand(match)]
        if not matches:
            if os.path.isdir(os.path.expanduser(pattern)):
                raise UserError(f"{flag}: the folder {pattern!r} holds no file of a kind that is read")
            raise UserError(f"{flag}: no file matches {pattern!r}.{_near_files(pattern)}")
        if matches != [Path(os.path.expanduser(pattern))]:
            with_text = [path for path in matches if not _is_empty(path)] or matches
            if left_out := len(matches) - len(with_text):
                logger.info(f"{flag} {pattern}: {left_out} of {len(matches)} files are empty, and left out")
            matches = with_text
        for path in matches:
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def _matches(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):  # a name with [ or * in it is taken literally
        return [Path(pattern)]
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]


def _expand(path: Path) -> list[Path]:
    if not path.is_dir() or is_saved_dataset(path):
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
        return f" A source that has a name needs a weight, too: {pattern}:1"
    folder = Path(os.path.expanduser(pattern)).parent
    if not folder.is_dir():
        return f" There is no folder {str(folder)!r}." if not glob.has_magic(str(folder)) else ""
    return nearest(Path(pattern).name, sorted(os.listdir(folder)))


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _file_member(path: Path, text_column: str) -> Member:
    if path.is_dir():
        return _dataset_member(str(path), _saved_dataset(str(path)), text_column)
    file_kind(path)
    if not path.exists():
        raise UserError(f"{path} is a link to nothing")
    if not path.is_file():  # a pipe would lose its first text, or wait for ever
        raise UserError(f"{path} is a pipe or a device, and text is read more than once: write it into a file")
    if _is_empty(path):
        raise UserError(f"{path} is empty")
    return FileMember(path, text_column)


# -- datasets ------------------------------------------------------------------------------------------------------


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` has saved the folder (`save_to_disk`), so that it can be memory-mapped."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _named_dataset(name: str, streaming: bool = False) -> Any:
    import datasets  # not above: it is slow to import and most runs read files

    try:
        return datasets.load_dataset(name, split=SPLIT, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        done = "streamed" if streaming else "loaded"
        raise UserError(f"{name!r} (split {SPLIT!r}) cannot be {done}: {error}") from error


def _saved_dataset(folder: str) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(folder)
    except IndexError as error:  # of data sets without files of rows
        raise UserError(f"{folder} is empty, or one of its splits is: it holds no row") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no folder that datasets.save_to_disk has written: {error}") from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if SPLIT not in dataset:
        raise UserError(f"{folder} has no split {SPLIT!r}; there are: {', '.join(dataset)}")
    return dataset[SPLIT]


def _dataset_member(label: str, dataset: Any, text_column: str) -> DatasetMember:
    check_column(dataset.features.arrow_schema, text_column, label)
    return DatasetMember(label, dataset, text_column)
