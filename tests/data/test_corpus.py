"""Files of every format become documents, and every way in which they can be broken has its
own clear error.
"""

import gzip
import os
import tracemalloc
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mora_ds.common.errors import UserError
from mora_ds.data import document_hash, load_corpus, readers, resolve_files
from mora_ds.data.held_out import HASHED_CHARACTERS, DocumentFilter
from mora_ds.data.readers import Document
from tests.helpers.errors import user_error
from tests.helpers.tables import rows
from tests.helpers.texts import json_lines

TEXTS = ["First document.\n", "Second, with ünïcödé 😀.", "  third\twith\r\nspace "]


def texts(*patterns, **settings):
    return list(load_corpus([str(pattern) for pattern in patterns], **settings).texts())


def error(*patterns, **settings):
    with pytest.raises(UserError) as caught:
        texts(*patterns, **settings)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.anything", "a", "a.txt.gz"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, name):
    data = "one\r\ntwo\n\n\tthree é".encode()
    (tmp_path / name).write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + data) if name.endswith(".gz") else data
    )
    assert texts(tmp_path / name) == [data.decode()]


def test_the_column_of_a_table_is_named(tmp_path):
    table = pa.table({"other": [1, 2, 3], "body": pa.array(TEXTS, pa.large_string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet", text_column="body") == TEXTS
    message = error(tmp_path / "a.parquet")
    assert (
        "a.parquet: no field 'text'; its fields are: other, body. Name one with --text_column"
        in message
    )


def test_a_saved_dataset(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"small": dataset.select([1]), "train": dataset}).save_to_disk(
        tmp_path / "splits"
    )
    datasets.DatasetDict({"small": dataset, "test": dataset}).save_to_disk(
        tmp_path / "untrained"
    )
    for name in ("plain", "splits"):
        assert list(load_corpus(dataset_name=str(tmp_path / name)).texts()) == TEXTS
        with user_error("name it with --dataset_name"):
            load_corpus([str(tmp_path / name)])
    with user_error(r"--dataset_name.*untrained' \(split 'train'\) cannot be loaded"):
        load_corpus(dataset_name=str(tmp_path / "untrained"))
    with user_error(r"--dataset_name.*no field 'txt'; its fields are: text"):
        load_corpus(dataset_name=str(tmp_path / "plain"), text_column="txt")


def test_a_dataset_name_may_be_a_folder_of_files(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train.jsonl").write_text(json_lines(TEXTS))
    assert list(load_corpus(dataset_name=str(tmp_path / "files")).texts()) == TEXTS


def test_patterns_keep_their_order_and_name_each_file_once(tmp_path):
    hidden = (".d.txt", ".hidden/e.txt")
    for name in ("b.txt", "a.txt", "deep/c.jsonl", "[x].txt", *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}\n')
    patterns = {
        "b.txt ?.txt .": ["b.txt", "a.txt", "[x].txt", "c.jsonl"],
        "**/*.jsonl": ["c.jsonl"],
        "[x].txt": ["[x].txt"],
    }
    for pattern, names in patterns.items():
        assert [
            path.name
            for path in resolve_files(
                [f"{tmp_path}/{name}" for name in pattern.split()]
            )
        ] == names


def test_empty_files_that_a_pattern_or_a_folder_finds_are_left_out(tmp_path):
    for name, content in (
        ("__init__.py", ""),
        ("a.py", "x = 1\n"),
        ("none/__init__.py", ""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for pattern in (tmp_path, tmp_path / "*.py", tmp_path / "**/*.py"):
        assert texts(pattern) == ["x = 1\n"]
    for named in (tmp_path / "__init__.py", tmp_path / "none", tmp_path / "none/*.py"):
        assert "__init__.py is empty" in error(named)
    assert "__init__.py is empty" in error(tmp_path / "a.py", tmp_path / "__init__.py")
    (tmp_path / "b.py").symlink_to("gone")
    assert "b.py is not a regular file" in error(tmp_path / "*.py")


def test_a_pipe_is_refused_before_anything_is_read_of_it(tmp_path):
    """A pipe like that of <(zcat a.gz) in a shell: the first read would consume a part
    of it."""
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.mkfifo(tmp_path / "a.txt")
    for path in (Path(f"/dev/fd/{reader}"), tmp_path / "a.txt", Path("/dev/zero")):
        assert "is not a regular file (a pipe, a device" in error(path)
    assert os.read(reader, 8) == b"text"
    os.close(reader)
    os.close(writer)


def test_chunks_of_a_long_text_add_up_to_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "_READ_BYTES", 777)  # cuts two-byte characters in half
    content = "".join(f"line {number} é\n" for number in range(500)) + "x" * 2500
    (tmp_path / "a.txt").write_text(content)
    pieces = list(load_corpus([str(tmp_path / "a.txt")]))
    assert "".join(piece.text for piece in pieces) == content
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) <= 1000
    assert all(piece.text.endswith("\n") for piece in pieces[:-4])


def test_a_long_first_line_does_not_decide_what_is_held_out(tmp_path):
    """A document has one hash, and the same chunks, as a text file and as a record."""
    text = "A title\n" + "and a text without line ends " * 40_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json_lines([text]))
    chunks = list(load_corpus([str(tmp_path / "a.txt")]))
    assert HASHED_CHARACTERS <= len(chunks[0].text) < len(text)
    assert document_hash(chunks[0].text) == document_hash(text)
    assert list(load_corpus([str(tmp_path / "a.jsonl")])) == chunks


def test_a_document_in_chunks_is_on_one_side():
    for number in range(20):
        chunks = [
            Document(f"{number} {chunk}", begins=chunk == 0, ends=chunk == 9)
            for chunk in range(10)
        ]
        assert len(list(DocumentFilter(0.5)(chunks))) in (0, 10)


def test_a_source_without_a_weight_is_named(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("{}")
    named = f"domain={tmp_path}/*.jsonl"  # taken for a plain path
    assert error(named).endswith(f"A named source also needs a weight: {named}:1")


FIRST = json_lines(TEXTS).encode()
RECORDS = r"""
{"text": "cut | line 4, column 10: invalid JSON
["text"] | line 4: a list instead of an object with a field 'text'; the
{"txt": "a", "id": 3} | line 4: no field 'text'; its fields are: txt, id. Name one with --text_column. Did you
{"text": 3} | line 4: field 'text' holds int, not text
{"text": null} | line 4: field 'text' holds NoneType, not text
{"text": "\ud800"} | line 4: field 'text' holds half a surrogate pair
"""
"""A line after three good ones | what is said of it."""
# With the time in it, workers would collect different tests
EMPTY_GZIP = gzip.compress(b"", mtime=0)
CUT_GZIP = gzip.compress(bytes(range(97, 122)) * 1000, mtime=0)[:-20]
UNREAD = "a.jsonl.bz2 a.zip a.parquet.GZ a.pdf a.csv a.csv.gz A.TSV a.arrow"
WRONG = [
    *(
        ("a.jsonl", FIRST + record.encode() + b"\n", message)
        for record, message in rows(RECORDS)
    ),
    ("a.txt.gz", EMPTY_GZIP, "is empty"),
    (
        "a.txt",
        "one\ntwo é".encode()[:-1],
        "line 2: not UTF-8 (byte 0xc3: unexpected end of data)",
    ),
    (
        "a.json",
        b'[\n{"text": "a"}\n]',
        "line 1, column 2: invalid JSON: Expecting value; the format is one object per line (jq",
    ),
    (
        "a.json",
        b'{\n"text": "a"\n}',
        "the format is one object per line (jq -c . makes a line of an object",
    ),
    (
        "a.jsonl",
        FIRST + b'{"text": "a", "n": -%s}\n' % (b"7" * 5000),
        "line 4: a number has more than 4300 digits",
    ),
    (
        "a.jsonl",
        FIRST + b'{"n": "[[[", "text": %s}\n' % (b"[" * 100_000 + b"]" * 100_000),
        "line 4: brackets are nested too deeply",
    ),
    ("a.txt.gz", CUT_GZIP, "cannot be read"),
    *(
        (name, b"x", "files are not supported; give text, JSON lines")
        for name in UNREAD.split()
    ),
]
"""Files that hold nothing, other bytes or other fields are lines of
tests/config/test_bad_launches.py."""


@pytest.mark.parametrize(
    "name, content, message",
    WRONG,
    ids=lambda value: value if type(value) is str else "",
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    text = error(tmp_path / name)
    assert text.startswith(f"--train_files: {tmp_path / name}")
    assert message in text


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_that_is_not_utf8(tmp_path, monkeypatch, name, bom):
    monkeypatch.setattr(readers, "_READ_BYTES", 7)
    data = bom + "fine\nalso fiñe\ncaf".encode() + b"\xe9 is Latin-1\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert f"{name}, line 3: not UTF-8 (byte 0xe9: " in error(tmp_path / name)


def test_a_long_line_takes_a_small_multiple_of_its_size(tmp_path):
    """Unpacked too: 16 MiB of one letter are 16 KiB of gzip."""
    size = 16 << 20
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines(["x" * size]).encode()))
    tracemalloc.start()
    try:
        assert sum(map(len, texts(path))) == size
        assert tracemalloc.get_traced_memory()[1] < 8 * size
    finally:
        tracemalloc.stop()


def test_unpacking_ends_at_the_limit_of_a_line(tmp_path, monkeypatch):
    """Whatever the rest would unpack to, and whether or not it holds a line end."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * (64 << 20)))
    monkeypatch.setattr(readers, "LINE_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        assert (
            "line 1: longer than 1 MiB, the maximum for a record; split it, or give"
            in error(path)
        )
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_table_with_a_null_without_rows_or_with_a_column_twice_is_named(tmp_path):
    pyarrow.parquet.write_table(
        pa.table({"text": ["a", "b", None]}), tmp_path / "a.parquet"
    )
    assert "a.parquet, row 3: the text is null" in error(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(
        pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet"
    )
    assert "b.parquet is empty" in error(tmp_path / "b.parquet")
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "c.parquet")
    assert "c.parquet: no field 'text'; its fields are: text, text" in error(
        tmp_path / "c.parquet"
    )


def test_text_in_a_table_that_is_not_utf8(tmp_path):
    """Arrow writes and reads any bytes as strings."""
    offsets = np.array([0, *[1] * 1030, 3], np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"a\xff\xfe")]
    table = pa.table(
        {"text": pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "a.parquet, row 1031: not UTF-8: " in error(tmp_path / "a.parquet")


def test_a_short_table_with_a_long_text_in_every_row_takes_little_memory(tmp_path):
    """Such a file has the text once; its 1,024 rows are 4 GiB."""
    long = "x" * (4 << 20)
    indices = pa.array([0] * 1024, pa.int32())
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, [long])})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 10_000
    before = pa.total_allocated_bytes()
    read = 0
    most = 0
    tracemalloc.start()
    try:
        for chunk in islice(load_corpus([str(path)]), 200):
            read += len(chunk.text)
            most = max(most, pa.total_allocated_bytes() - before)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(long)
    finally:
        tracemalloc.stop()
    assert read == 200 << 20
    assert most < 16 * len(long)


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_a_text_in_a_table_may_be_as_long_as_a_line(tmp_path, monkeypatch, kind):
    table = pa.table({"text": pa.array(["a", "a", "ääää"], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(readers, "LINE_BYTES", 8)
    assert texts(tmp_path / "a.parquet") == ["a", "a", "ääää"]
    monkeypatch.setattr(readers, "LINE_BYTES", 7)
    assert "a.parquet, row 3: longer than 0 MiB" in error(tmp_path / "a.parquet")


def test_the_first_document_is_checked_before_anything_is_read(tmp_path):
    (tmp_path / "good.jsonl").write_text(json_lines(TEXTS))
    (tmp_path / "other.jsonl").write_text('{"content": "a"}\n')
    with user_error(r"other.jsonl, line 1: no field 'text'"):
        load_corpus([str(tmp_path / "*.jsonl")])


# -- names -----------------------------------------------------------------------------


def test_a_file_that_two_names_lead_to_is_read_once(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.txt").symlink_to("b.txt")
    (tmp_path / "e.txt").write_text("")
    corpus = load_corpus([str(tmp_path / "c.txt"), str(tmp_path / "*.txt")])
    assert list(corpus.texts()) == ["c.txt", "a.txt", "b.txt"]
    assert corpus.size_bytes() == 15
    assert [file.label for file in corpus.members] == [
        str(tmp_path / name) for name in ("c.txt", "a.txt", "b.txt")
    ]


def test_a_hub_name_is_printed_with_its_source():
    with user_error(r"source 'law': '/no/such/set' \(split 'train'\) cannot be loaded"):
        load_corpus(dataset_name="/no/such/set", streaming=True, flag="source 'law'")


def test_the_training_split_of_a_name_is_streamed(tmp_path):
    (tmp_path / "train.jsonl").write_text(json_lines("a"))
    (tmp_path / "test.jsonl").write_text(json_lines("b"))
    assert list(load_corpus(dataset_name=str(tmp_path), streaming=True).texts()) == [
        "a"
    ]
    with user_error("no field 'body'"):
        load_corpus(dataset_name=str(tmp_path), streaming=True, text_column="body")
