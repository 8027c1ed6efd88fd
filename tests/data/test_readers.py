"""Readers of files: from any position on, up to their limits, and what a suffix and a
column say.
"""

import codecs
import gzip
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from mora_ds.data import load_corpus, members, readers, resolve_files
from tests.helpers.errors import user_error
from tests.helpers.texts import json_lines


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "hub"])
def test_a_long_record_is_read_in_chunks(tmp_path, kind, monkeypatch):
    """The position after a chunk is that before its record; from the last one's on, the
    next record is read."""
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 4)
    rows = ["ab", "some\ntext", "cd"]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(rows).encode()))
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pa.table({"text": rows}), path)
    corpus = (
        load_corpus(dataset_name=str(tmp_path), streaming=True)
        if kind == "hub"
        else load_corpus([str(path)])
    )
    (member,) = corpus.members
    full = list(member.documents_after(readers.START))
    assert [document.text for document, _ in full] == ["ab", "some", "\ntex", "t", "cd"]
    assert [document.begins for document, _ in full] == [True, True, False, False, True]
    assert [document.ends for document, _ in full] == [True, False, False, True, True]
    marks = [mark for _, mark in full]
    assert marks[0] == marks[1] == marks[2]
    assert list(member.documents_after(marks[1])) == full[1:]
    assert list(member.documents_after(marks[3])) == full[4:]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "dataset"])
def test_a_file_is_read_from_any_of_its_marks(tmp_path, kind):
    """Row groups and batches end within and at the mark; lines may be blank, and the first
    has a byte order mark.
    """
    rows = [f"text {number} é" for number in range(7)]
    table = pa.table({"id": range(7), "text": rows})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    elif kind == "dataset":
        datasets.Dataset(table).save_to_disk(path)
    else:
        lines = json_lines(rows).replace("\n", "\n \n", 2)
        data = codecs.BOM_UTF8 + lines.encode()
        padding = bytes(512)  # of stores that write whole blocks
        path.write_bytes(gzip.compress(data) + padding if kind.endswith("gz") else data)
    corpus = (
        load_corpus(dataset_name=str(path))
        if kind == "dataset"
        else load_corpus([str(path)])
    )
    (member,) = corpus.members
    full = list(member.documents_after(readers.START))
    assert [document.text for document, _ in full] == rows
    assert all(document.begins and document.ends for document, _ in full)
    for count, (_, mark) in enumerate(full, start=1):
        assert list(member.documents_after(mark)) == full[count:]
    numbers = [1, 3, 5, 6, 7, 8, 9] if kind.startswith("jsonl") else list(range(1, 8))
    assert [mark.record for _, mark in full] == numbers


def test_a_text_file_is_read_once(tmp_path, monkeypatch):
    """The position after a chunk is that before its document."""
    (tmp_path / "a.txt").write_text("some text")
    (member,) = load_corpus([str(tmp_path / "a.txt")]).members
    ((document, mark),) = member.documents_after(readers.START)
    assert document.text == "some text"
    assert list(member.documents_after(mark)) == []
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 4)
    chunks = [
        (document.text, mark)
        for document, mark in member.documents_after(readers.START)
    ]
    assert chunks == [
        ("some", readers.START),
        (" tex", readers.START),
        ("t", readers.Mark(1)),
    ]


def test_a_dataset_without_rows_is_empty(tmp_path):
    none = datasets.Dataset(pa.table({"text": pa.array([], pa.string())}))
    none.save_to_disk(tmp_path / "none")
    with user_error(r"none' .* cannot be loaded"):
        load_corpus(dataset_name=str(tmp_path / "none"))
    with user_error("rows is empty: it has no rows"):
        list(members.DatasetMember("rows", none, "text").documents_after(readers.START))


def test_batches_end_with_the_item_that_fills_them(monkeypatch):
    monkeypatch.setattr(readers, "BATCH_CHARACTERS", 6)
    items = ["abc", "def", "", "ghijklm", "n"]
    assert list(readers.batched(items, len)) == [["abc", "def"], ["", "ghijklm"], ["n"]]
    assert list(readers.batched(items[:2], len)) == [["abc", "def"]]
    assert not list(readers.batched([], len))


def test_a_line_may_be_as_long_as_the_limit(tmp_path, monkeypatch):
    """Unpacked, where the file is compressed."""
    content = b'{"text": "a"}\n'
    for name, data in (("a.jsonl", content), ("a.jsonl.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(readers, "LINE_BYTES", len(content))
        assert list(load_corpus([str(tmp_path / name)]).texts()) == ["a"]
        monkeypatch.setattr(readers, "LINE_BYTES", len(content) - 1)
        with user_error(f"{name}, line 1: longer"):
            load_corpus([str(tmp_path / name)])


@pytest.mark.parametrize(
    "kind, message",
    [
        (pa.dictionary(pa.int32(), pa.string()), None),
        (pa.string_view(), None),
        (pa.dictionary(pa.int32(), pa.int64()), "holds int64, not strings"),
        (pa.list_(pa.string()), "holds list<"),
        (pa.binary(), "holds binary, not strings"),
    ],
    ids=str,
)
def test_columns_that_hold_text(kind, message):
    schema = pa.schema({"body": pa.string(), "text": kind})
    if message is None:
        readers.check_column(schema, "text", "a.parquet")
    else:
        with user_error(f"a.parquet: column 'text' {message}"):
            readers.check_column(schema, "text", "a.parquet")


def test_suffixes_say_what_a_file_is(tmp_path):
    """The suffix is read in upper and lower case, and below that of a compressed
    file."""
    (tmp_path / ".hidden").mkdir()
    names = (
        "A.TXT b.JSONL.GZ b.json.zst c.pdf d.gz e.md.bz2 .hidden/f.txt z/.i.txt z/g.txt "
        "y/h.PY"
    )
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [
        path.relative_to(tmp_path).as_posix() for path in resolve_files([str(tmp_path)])
    ]
    assert found == ["A.TXT", "b.JSONL.GZ", "b.json.zst", "y/h.PY", "z/g.txt"]
    kinds = [
        readers.file_kind(Path(name))
        for name in ("A.TXT.gz", "b.JSONL.GZ", "c.ndjson", "c.PARQUET")
    ]
    assert kinds == ["text", "json", "json", "parquet"]
    assert readers.is_compressed(Path("a.ZST"))
    assert not readers.is_compressed(Path("a.zst.txt"))


def test_a_table_that_is_unpacked_to_any_size_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * (readers.LINE_BYTES + 1)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    with user_error("column 'text' is unpacked to more than 256 times its size"):
        next(readers.read_file(path, "text", readers.START))
