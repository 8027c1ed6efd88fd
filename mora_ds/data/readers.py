"""Reads a file as documents. Every error names the file and the line or row.

    .txt .md ...   one document per file
    .jsonl .json   one object per line; the document is the object's text field
    .parquet       one document per row
    .gz .zst       compressed text and JSON lines

A long document is passed on in chunks of about a million characters, because
tokenizing takes about 200 times the size of a text. Only one chunk, line or row is in
memory at a time. A line or a value of a table is not read in chunks, so its size is
limited: `LINE_BYTES`.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from mora_ds.common.errors import UserError, nearest
from mora_ds.common.untrusted import parse_json

CHUNK_CHARACTERS = 1 << 20
"""Maximum length of a chunk of a document. A chunk ends at a line end if there is one
in its second half."""

BATCH_CHARACTERS = 1 << 18
"""Characters of one batch of documents, the work unit of a tokenizing process."""

LINE_BYTES = 32 << 20
"""Maximum length of a JSON line, and of a text in a table."""

EXPANSION = 256
"""How many times its size a compressed column of text may have; zstd makes 30,000 of
zeros, and 3 to 10 of text."""

_READ_BYTES = 1 << 20
ROWS_PER_BATCH = 4
"""Rows of a table that are decoded at once: a short file may have one long text in every
row."""


@dataclass(frozen=True)
class Document:
    """A document, or one chunk of a long document."""

    text: str
    begins: bool = True
    """Whether this is the document's first chunk."""
    ends: bool = True
    """Whether this is the document's last chunk."""

    @property
    def is_empty(self) -> bool:
        """Whether the document has no text."""
        return self.begins and self.ends and not self.text


@dataclass(frozen=True)
class Mark:
    """A position between two documents of a file or dataset. Saved in checkpoints."""

    record: int = 0
    """Lines, rows or documents before the position."""
    offset: int = 0
    """Bytes before the position, for formats that can be read from any byte on."""
    state: Any = None
    """The state of a `datasets.IterableDataset` (its `state_dict`), None for files."""


MarkedDocuments = Iterator[tuple[Document, Mark]]
"""Documents, each with the position after it; a chunk with the position before its
document."""

START = Mark()


Item = TypeVar("Item")


def batched(
    items: Iterable[Item], characters: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Batches of consecutive items with at least `BATCH_CHARACTERS`, except for the last
    batch."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


TEXT = "text"
JSON = "json"
PARQUET = "parquet"
TOKENS = "tokens"
_KINDS = {
    **dict.fromkeys(
        (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".xml", ".py"),
        TEXT,
    ),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), JSON),
    ".parquet": PARQUET,
    **dict.fromkeys((".bin", ".ds", ".npy"), TOKENS),
}
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_UNREADABLE = (
    ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".pdf", ".docx", ".csv", ".tsv", ".arrow", ".safetensors",
)  # fmt: skip


def has_known_suffix(path: Path) -> bool:
    """Whether the file is read if the user names its folder: files of text."""
    return _KINDS.get(_inner_suffix(path), TOKENS) != TOKENS


def file_kind(path: Path) -> str:
    """The format of a file by its suffix; an unknown suffix means text. Raises
    `UserError` for unsupported formats."""
    suffix = _inner_suffix(path)
    kind = _KINDS.get(suffix, TEXT)
    if suffix in _UNREADABLE or (is_compressed(path) and kind not in (TEXT, JSON)):
        raise UserError(
            f"{path}: {''.join(Path(path.name).suffixes[-2:])} files are not supported; give text, JSON lines (both "
            "also as .gz or .zst) or Parquet, or a dataset saved by `datasets` with --dataset_name"
        )
    return kind


def is_compressed(path: Path) -> bool:
    """Whether the file is compressed, so that it can only be read from its start."""
    return Path(path.name).suffix.lower() in _COMPRESSED


def _inner_suffix(path: Path) -> str:
    name = Path(path.name)
    return Path(name.stem if is_compressed(path) else name).suffix.lower()


def read_file(path: Path, text_column: str, mark: Mark) -> MarkedDocuments:
    """The documents of a file after `mark`, each with the position after it (a chunk:
    with the position before its document).

    JSON lines are read from the mark's byte on, Parquet from the mark's row group. A
    compressed file is decompressed, but not parsed, up to the mark. Raises `UserError`
    at the first line or row that is not a document.
    """
    kind = file_kind(path)
    try:
        if kind == TEXT:
            yield from _read_text(path, mark)
        elif kind == JSON:
            yield from _read_json(path, text_column, mark)
        else:
            columns = _parquet_columns(path, text_column, mark.record)
            yield from read_rows(str(path), columns, mark.record)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def text_field(row: Any, text_column: str, source: str) -> str:
    """The text of one JSON record. Raises `UserError` if the field is missing or not a
    string."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise UserError(
            f"{source}: a {kind} instead of an object with a field {text_column!r}{_ONE_PER_LINE}"
        )
    if text_column not in row:
        raise _no_column(source, text_column, row)
    field = f"{source}: field {text_column!r}"
    text = row[text_column]
    if not isinstance(text, str):
        raise UserError(
            f"{field} holds {type(text).__name__}, not text (see --text_column)"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{field} holds half a surrogate pair, at {error.start}"
        ) from None
    return text


def check_column(schema: pa.Schema, text_column: str, source: str) -> None:
    """Raise `UserError` unless the table has exactly one column of that name, with
    strings."""
    index = schema.get_field_index(text_column)
    # -1 means no column, or several.
    if index < 0:
        raise _no_column(source, text_column, schema.names)
    kind = schema.field(index).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(
            f"{source}: column {text_column!r} holds {kind}, not strings (see --text_column)"
        )


def _no_column(source: str, text_column: str, names: Iterable[str]) -> UserError:
    fields = ", ".join(names) or "none"
    suggestion = nearest(text_column, names)
    return UserError(
        f"{source}: no field {text_column!r}; its fields are: {fields}. Name one with --text_column.{suggestion}"
    )


def _open(path: Path) -> IO[bytes]:
    compression = _COMPRESSED.get(Path(path.name).suffix.lower())
    # Some stores pad files with zeros at the end. Only Python's reader accepts that.
    if compression == "gzip":
        return io.BufferedReader(gzip.open(_source(path)))
    stream = pa.input_stream(_source(path), compression)
    return io.BufferedReader(stream, _READ_BYTES)


def _source(path: Any) -> Any:
    """What libraries open: a path, or the bytes of a file at a URL."""
    return str(path) if isinstance(path, Path) else path.open()


# -- text ------------------------------------------------------------------------------


def _read_text(path: Path, mark: Mark) -> MarkedDocuments:
    """The chunks of a text file."""
    if mark != START:
        return
    for chunk in _chunks(_decoded(path)):
        if chunk.is_empty:
            raise UserError(f"{path} is empty")
        yield chunk, Mark(1) if chunk.ends else START


def in_chunks(text: str, before: Mark, after: Mark) -> MarkedDocuments:
    """A document between two positions, in chunks if it is long."""
    for chunk in _chunks([text]):
        yield chunk, after if chunk.ends else before


def _chunks(blocks: Iterable[str]) -> Iterator[Document]:
    """The chunks of a document, given in blocks of its text. Each is cut after the last
    line end in its second half, if there is one, so that few words are split."""
    pending = ""
    begins = True
    for block in blocks:
        pending += block
        while len(pending) > CHUNK_CHARACTERS:
            # Not near the start: the hash of the first chunk decides whether the
            # document is held out.
            line_end = pending.rfind("\n", CHUNK_CHARACTERS // 2, CHUNK_CHARACTERS)
            cut = CHUNK_CHARACTERS if line_end < 0 else line_end + 1
            yield Document(pending[:cut], begins, ends=False)
            pending = pending[cut:]
            begins = False
    yield Document(pending, begins)


def _decoded(path: Path) -> Iterator[str]:
    """Blocks of decoded text, without a byte order mark, with unchanged line ends."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = 1
    with _open(path) as stream:
        block = b"first"
        while block:
            block = stream.read(_READ_BYTES)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                lines += error.object[: error.start].count(b"\n")
                raise _not_utf8(f"{path}, line {lines}", error) from None
            lines += text.count("\n")
            yield text


def _not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); convert the file, for example "
        "with iconv, or remove it from the flag"
    )


# -- JSON ------------------------------------------------------------------------------


_ONE_PER_LINE = "; the format is one object per line (jq -c . makes a line of an object, jq -c '.[]' lines of an array)"


def _read_json(path: Path, text_column: str, mark: Mark) -> MarkedDocuments:
    """The records of JSON lines. Skips blank lines and a byte order mark."""
    offset = mark.offset
    is_empty = mark == START
    with _open(path) as stream:
        if is_compressed(path):
            for _ in islice(_lines(stream, path), mark.record):
                pass
        else:
            stream.seek(offset)
        lines = _lines(stream, path, mark.record)
        for number, line in enumerate(lines, start=mark.record + 1):
            before = Mark(number - 1, offset)
            offset += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                is_empty = False
                where = f"{path}, line {number}"
                row = _parse(where, line.rstrip(b"\r\n"))
                text = text_field(row, text_column, where)
                yield from in_chunks(text, before, Mark(number, offset))
    if is_empty:
        raise UserError(f"{path} is empty: it has no JSON record")


def _lines(stream: IO[bytes], path: Path, before: int = 0) -> Iterator[bytes]:
    for number in count(before + 1):
        line = stream.readline(LINE_BYTES + 1)
        if not line:
            return
        if len(line) > LINE_BYTES:
            raise _too_long(f"{path}, line {number}", _ONE_PER_LINE)
        yield line


def _too_long(where: str, hint: str = "") -> UserError:
    return UserError(
        f"{where}: longer than {LINE_BYTES >> 20} MiB, the maximum for a record; split it, or give the document as a "
        f"text file, which is read in chunks{hint}"
    )


def _parse(where: str, line: bytes) -> Any:
    """The JSON value of a line."""
    try:
        return parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}, column {error.colno}: invalid JSON: {error.msg}{_ONE_PER_LINE}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{where}: {error}; change the value, or remove the line"
        ) from None


# -- tables ----------------------------------------------------------------------------


def _parquet_columns(path: Path, text_column: str, skip: int) -> Iterator[pa.Array]:
    """The text column without its first `skip` rows, in batches."""
    with pyarrow.parquet.ParquetFile(_source(path)) as table:
        check_column(table.schema_arrow, text_column, str(path))
        _check_expansion(table.metadata, text_column, path)
        groups = list(range(table.num_row_groups))
        while groups and skip >= (rows := table.metadata.row_group(groups[0]).num_rows):
            groups.pop(0)
            skip -= rows
        # For an empty list pyarrow would read all groups.
        if not groups:
            return
        columns = [text_column]
        for batch in table.iter_batches(ROWS_PER_BATCH, groups, columns):
            yield batch.column(0).slice(skip)
            skip = max(skip - len(batch), 0)


def _check_expansion(metadata: Any, text_column: str, path: Path) -> None:
    """Raise `UserError` for text that may take any memory: a page is unpacked as a
    whole."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            size = column.total_uncompressed_size
            is_text = column.path_in_schema == text_column
            if is_text and size > max(
                LINE_BYTES, EXPANSION * column.total_compressed_size
            ):
                raise UserError(
                    f"{path}: column {text_column!r} is unpacked to more than {EXPANSION} times its size, {size:,} "
                    "bytes; write the file without compression"
                )


def read_rows(label: str, columns: Iterable[pa.Array], row: int) -> MarkedDocuments:
    """The documents of a table's text column, given in batches. `row`: number of skipped
    rows. Raises `UserError` for a null, for text that is too long or not UTF-8, and for a
    table without rows."""
    for column in columns:
        for value in column:
            text = _row_text(value, f"{label}, row {row + 1}")
            yield from in_chunks(text, Mark(row), Mark(row + 1))
            row += 1
    if row == 0:
        raise UserError(f"{label} is empty: it has no rows")


def _row_text(value: pa.Scalar, where: str) -> str:
    if isinstance(value, pa.DictionaryScalar):
        value = value.value
    if not value.is_valid:
        raise UserError(f"{where}: the text is null")
    if value.as_buffer().size > LINE_BYTES:
        raise _too_long(where)
    try:
        text: str = value.as_py()
        return text
    # Arrow does not validate strings before
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: {error}") from None
