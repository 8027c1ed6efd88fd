"""One file -> its documents, checked as they are read: every error names the file and the line (or row).

    .txt .md ...   one document a file, in pieces of about a million characters when it is long
    .jsonl .json   one object a line, or one array of objects; the document is its text field
    .parquet       one document a row
    .arrow         one document a row (stream or file format, so also what `datasets` writes)
    .gz .zst       of text and JSON

Nothing here holds more than one piece, line or record batch in memory (a `.json` array apart, which is parsed whole).
What cannot be read in pieces has a limit: `LINE_BYTES`, `ARRAY_BYTES`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from mora_ds.errors import UserError, nearest

PIECE_CHARACTERS = 1 << 20
"""A text file longer than this is handed on in pieces of about this size, cut at line ends."""

LINE_BYTES = 256 << 20
"""A JSON line takes several times its size in memory while it is parsed, in every process that reads."""

ARRAY_BYTES = 2 << 30
"""Of a JSON array, unpacked."""

_READ_BYTES = 1 << 20
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Document:
    """A document, or a piece of one that is too long to hold: the first piece `begins` it, the last one `ends` it."""

    text: str
    source: str
    """File and line or row, for error messages."""
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Mark:
    """A place between two documents of a file or data set."""

    record: int = 0
    """Lines, rows or documents before it."""
    offset: int = 0
    """Bytes before it, where the format can be entered there."""
    state: Any = None
    """Of a `datasets` stream, in its own words."""


START = Mark()


class FileKind(str, Enum):
    TEXT = "text"
    JSON = "json"
    PARQUET = "parquet"
    ARROW = "arrow"


TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".xml", ".py")
_KINDS = {
    **dict.fromkeys(TEXT_SUFFIXES, FileKind.TEXT),
    ".json": FileKind.JSON,
    ".jsonl": FileKind.JSON,
    ".ndjson": FileKind.JSON,
    ".parquet": FileKind.PARQUET,
    ".arrow": FileKind.ARROW,
}
_PACKED = (".gz", ".zst")
_UNREADABLE = (".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".pdf", ".docx", ".safetensors", ".bin", ".npy")


def has_known_suffix(path: Path) -> bool:
    """Whether a folder's scan takes this file."""
    return _inner_suffix(path) in _KINDS


def file_kind(path: Path) -> FileKind:
    """The format of a file by its suffix; an unknown one is text. Raises `UserError` for one that cannot be read."""
    suffix = _inner_suffix(path)
    kind = _KINDS.get(suffix, FileKind.TEXT)
    if suffix in _UNREADABLE or (is_packed(path) and kind in (FileKind.PARQUET, FileKind.ARROW)):
        raise UserError(
            f"{path}: {''.join(path.suffixes[-2:])} files are not read; "
            "give text, JSON lines (both also as .gz or .zst), Parquet or Arrow"
        )
    return kind


def is_packed(path: Path) -> bool:
    """Whether the file is compressed as a whole."""
    return path.suffix.lower() in _PACKED


def read_documents(path: Path, text_column: str) -> Iterator[Document]:
    """The documents of one file, in its order. Raises `UserError` at the first line or row that is none."""
    return (document for document, _ in read_marked(path, text_column, START))


def read_marked(path: Path, text_column: str, mark: Mark) -> Iterator[tuple[Document, Mark]]:
    """The documents behind `mark`, each with the mark behind it (for a piece: the one before its document).

    JSON lines are entered at the mark's byte, tables at its row group or record batch; what is compressed as a whole
    is unpacked, unparsed, up to the mark.
    """
    kind = file_kind(path)
    with _naming(path):
        if kind is FileKind.TEXT:
            pieces = _read_text(path) if mark == START else iter(())
            yield from ((piece, Mark(1) if piece.ends else START) for piece in pieces)
        elif kind is FileKind.JSON:
            yield from _read_json(path, text_column, mark)
        else:
            batches = _parquet_batches if kind is FileKind.PARQUET else _arrow_batches
            yield from _read_rows(path, batches(path, text_column, mark.record), mark.record)


def text_field(row: Any, text_column: str, source: str) -> str:
    """The text of one record; says which fields there are when the column is missing, and what is there instead."""
    if not isinstance(row, dict):
        raise UserError(f"{source}: a {type(row).__name__} where an object with a field {text_column!r} should be")
    if text_column not in row:
        raise _no_column(source, text_column, row)
    text = row[text_column]
    if not isinstance(text, str):
        raise UserError(f"{source}: field {text_column!r} holds {type(text).__name__}, not text (see --text_column)")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source}: field {text_column!r} holds half a surrogate pair, at {error.start}") from None
    return text


def check_column(schema: pa.Schema, text_column: str, source: str) -> None:
    """Raises `UserError` unless the table has that column and it holds strings."""
    if text_column not in schema.names:
        raise _no_column(source, text_column, schema.names)
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()):
        raise UserError(f"{source}: column {text_column!r} holds {kind}, not strings (see --text_column)")


def _no_column(source: str, text_column: str, names: Iterable[str]) -> UserError:
    names = list(names)
    return UserError(
        f"{source}: no field {text_column!r}; there are: {', '.join(names) or 'none'}. "
        f"Name it with --text_column.{nearest(text_column, names)}"
    )


def _inner_suffix(path: Path) -> str:
    return Path(path.stem if is_packed(path) else path.name).suffix.lower()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what the libraries raise for a broken file into a `UserError` that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"), _READ_BYTES)
    return path.open("rb")


# -- text ----------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> Iterator[Document]:
    """Pieces are cut behind the last line end, if any, so that no token is torn without need."""
    held, begins = "", True
    for block in _decoded(path):
        held += block
        while len(held) > PIECE_CHARACTERS:
            cut = held.rfind("\n", 0, PIECE_CHARACTERS) + 1 or PIECE_CHARACTERS
            yield Document(held[:cut], str(path), begins, ends=False)
            held, begins = held[cut:], False
    if begins and not held:
        raise UserError(f"{path} is empty")
    yield Document(held, str(path), begins)


def _decoded(path: Path) -> Iterator[str]:
    """Blocks of text; a byte order mark is dropped, line ends stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines, size = 1, 0
    with _open(path) as stream:
        while True:
            block = stream.read(_READ_BYTES)
            size += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                lines += error.object[: error.start].count(b"\n")
                raise _not_utf8(path, lines, size - len(error.object), error) from None
            lines += text.count("\n")
            yield text
            if not block:
                return


def _not_utf8(path: Path, line: int, start: int, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {start + error.start}: "
        f"{error.reason}); convert the file, for instance with iconv, or leave it out"
    )


# -- JSON ----------------------------------------------------------------------------------------------------------


def _read_json(path: Path, text_column: str, mark: Mark) -> Iterator[tuple[Document, Mark]]:
    found = mark != START
    rows = _array_rows(path, mark) if _is_array(path) else _line_rows(path, mark)
    for source, row, behind in rows:
        found = True
        yield Document(text_field(row, text_column, source), source), behind
    if not found:
        raise UserError(f"{path} is empty: it holds no JSON record")


def _is_array(path: Path) -> bool:
    with _open(path) as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _line_rows(path: Path, mark: Mark) -> Iterator[tuple[str, Any, Mark]]:
    """(file and line, value, mark behind it) of every line that is not blank."""
    offset = mark.offset
    with _open(path) as stream:
        if is_packed(path):
            for _ in islice(_lines(stream, path), mark.record):
                pass
        else:
            stream.seek(offset)
        for number, line in enumerate(_lines(stream, path, mark.record), start=mark.record + 1):
            start, offset = offset, offset + len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                row = _parse(path, line.rstrip(b"\r\n"), number, start)
                yield f"{path}, line {number}", row, Mark(number, offset)


def _lines(stream: IO[bytes], path: Path, before: int = 0) -> Iterator[bytes]:
    for number in count(before + 1):
        line = stream.readline(LINE_BYTES + 1)
        if not line:
            return
        if len(line) > LINE_BYTES:
            raise UserError(
                f"{path}, line {number}: longer than {LINE_BYTES >> 20} MiB, and a record is parsed whole; split it, "
                "or give the document as a text file, which is read in pieces"
            )
        yield line


def _array_rows(path: Path, mark: Mark) -> Iterator[tuple[str, Any, Mark]]:
    data = bytearray()
    with _open(path) as stream:
        while block := stream.read(_READ_BYTES):
            data += block
            if len(data) > ARRAY_BYTES:
                raise UserError(
                    f"{path}: an array of more than {ARRAY_BYTES >> 20} MiB, which is parsed whole; make it JSON "
                    "lines, for instance with jq -c '.[]'"
                )
    rows = _parse(path, bytes(data.removeprefix(codecs.BOM_UTF8)), 1, 0)
    for number, row in enumerate(rows[mark.record :], start=mark.record + 1):
        yield f"{path}, element {number}", row, Mark(number)


def _parse(path: Path, data: bytes, line: int, offset: int) -> Any:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(path, line + data[: error.start].count(b"\n"), offset, error) from None
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{where}: broken JSON: {error.msg} (one object a line, or one array of objects)") from None


# -- tables --------------------------------------------------------------------------------------------------------


def _parquet_batches(path: Path, text_column: str, skip: int) -> Iterator[pa.Array]:
    with pyarrow.parquet.ParquetFile(path) as table:
        check_column(table.schema_arrow, text_column, str(path))
        groups = list(range(table.num_row_groups))
        while groups and skip >= (rows := table.metadata.row_group(groups[0]).num_rows):
            groups, skip = groups[1:], skip - rows
        batches = table.iter_batches(_ROWS_PER_BATCH, row_groups=groups, columns=[text_column]) if groups else ()
        yield from _without_first((batch.column(0) for batch in batches), skip)


def _arrow_batches(path: Path, text_column: str, skip: int) -> Iterator[pa.Array]:
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            check_column(file.schema, text_column, str(path))
            batches: Iterable[pa.RecordBatch] = map(file.get_batch, range(file.num_record_batches))
        else:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            check_column(stream.schema, text_column, str(path))
            batches = stream
        columns = (batch.column(batch.schema.get_field_index(text_column)) for batch in batches)
        yield from _without_first(columns, skip)


def _without_first(columns: Iterable[pa.Array], skip: int) -> Iterator[pa.Array]:
    for column in columns:
        if skip < len(column):
            yield column.slice(skip)
        skip = max(skip - len(column), 0)


def _read_rows(path: Path, columns: Iterable[pa.Array], row: int) -> Iterator[tuple[Document, Mark]]:
    for column in columns:
        for start in range(0, len(column), _ROWS_PER_BATCH):
            for text in column.slice(start, _ROWS_PER_BATCH).to_pylist():
                row += 1
                if text is None:
                    raise UserError(f"{path}, row {row}: the text is null")
                yield Document(text, f"{path}, row {row}"), Mark(row)
    if row == 0:
        raise UserError(f"{path} is empty: it holds no row")
