"""Streaming: failures that pass are waited out, damage and ends are named."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from mora_ds.common.errors import RunError, UserError
from mora_ds.data import (
    Corpus,
    Document,
    DocumentStream,
    PackedDataset,
    build_cache,
    load_corpus,
    readers,
    stream,
)
from mora_ds.data.stream import StreamPosition
from tests.helpers.streams import T, assert_equal, documents, source, taken, write


class Flaky:
    """A part that fails as disks and networks do, before every record in `bad`, `times` times each."""

    def __init__(self, part: Any, bad: dict[int, int], error: Exception) -> None:
        self.part, self.bad, self.error, self.label = part, bad, error, part.label

    def marked(self, mark: Any) -> Iterator[tuple[Document, Any]]:
        for document, behind in self.part.marked(mark):
            if self.bad.get(behind.record, 0) > 0:
                self.bad[behind.record] -= 1
                raise self.error
            yield document, behind


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(stream.time, "sleep", seconds.append)
    return seconds


def told(cause: Exception) -> UserError:
    """What a reader makes of an error."""
    error = UserError("a.jsonl cannot be read")
    error.__cause__ = cause
    return error


IO_ERROR = OSError(5, "Input/output error")
PASSING = [IO_ERROR, told(IO_ERROR), ConnectionError("reset by peer"), httpx.ConnectError("no route to host")]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_passing_failures_are_retried(
    tokenizer: Any, tmp_path: Path, waits: list[float], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", documents()))
    whole = taken(source(corpus, tokenizer, 10), 0, 300)
    parts = tuple(Flaky(part, {5: 2, 20: 1}, error) for part in corpus.parts)
    shaky = source(Corpus(parts), tokenizer, 10)  # type: ignore[arg-type]
    assert_equal(taken(shaky, 0, 300), whole)
    assert waits[:3] == [1.0, 2.0, 1.0], "the first wait again after every new record"
    assert all("source 'a'" in line and str(error) in line for line in caplog.messages)
    assert "after record 4" in caplog.messages[0] and "trying again in 1 s" in caplog.messages[0]


def test_a_failure_that_stays_ends_the_run(tokenizer: Any, tmp_path: Path, waits: list[float]) -> None:
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", documents()))
    parts = tuple(Flaky(part, {20: 10**6}, OSError("gone")) for part in corpus.parts)
    with pytest.raises(RunError, match=r"source 'a': .*0.jsonl cannot be read after record 19, tried for 120 s: gone"):
        taken(source(Corpus(parts), tokenizer), 0, 300)  # type: ignore[arg-type]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 29.0]


def test_a_failure_within_a_document_repeats_no_chunk(
    tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 100)
    text = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "a.txt").write_text(text)
    (part,) = load_corpus([str(tmp_path / "a.txt")]).parts
    shaky = Corpus((Flaky(part, {1: 2}, IO_ERROR),))  # type: ignore[arg-type]  # before the last chunk
    chunks = [chunk for chunk, _ in DocumentStream("a", shaky).epoch(StreamPosition())]
    assert "".join(chunk.text for chunk in chunks) == text and len(chunks) == 9
    assert waits == [1.0, 2.0]


def test_damage_in_the_middle_is_named_and_not_tried_again(tokenizer: Any, tmp_path: Path, waits: list[float]) -> None:
    lines = [json.dumps({"text": text}) for text in documents()]
    broken = {
        "broken.jsonl": ("\n".join([*lines[:40], '{"text": 5', *lines[40:]]), "line 41, column"),
        "fields.jsonl": ("\n".join([*lines[:40], '{"body": "x"}']), "line 41: no field 'text'; there are: body"),
        "kind.jsonl": ("\n".join([*lines[:40], '{"text": 7}']), "line 41: field 'text' holds int"),
    }  # fmt: skip
    for name, (content, said) in broken.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as error:
            taken(source(load_corpus([str(tmp_path / name)]), tokenizer), 0, 2000)
        assert f"source 'a': {tmp_path / name}, {said}" in str(error.value)
    numbers = random.Random(0)  # do not compress
    content = b"".join(json.dumps({"text": numbers.randbytes(1000).hex()}).encode() + b"\n" for _ in range(900))
    gz, zst = gzip.compress(content), pa.compress(content, "zstd", asbytes=True)
    for name, damaged in {"a.gz": gz[:-40], "b.gz": gz[:-8] + bytes(4) + gz[-4:], "c.zst": zst[:-40]}.items():
        path = tmp_path / f"damaged.jsonl.{name[2:]}"  # in b.gz the checksum
        path.write_bytes(damaged)
        documents_of = DocumentStream("a", load_corpus([str(path)]))
        with pytest.raises(UserError, match=rf"source 'a': .*{path.name} cannot be read"):
            list(documents_of.epoch(StreamPosition()))
    assert not waits


def test_a_stream_that_ends_early_says_so(tokenizer: Any, tmp_path: Path) -> None:
    """With `epochs` it ends, without it begins again."""
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", documents(20)))
    n = PackedDataset(build_cache(corpus, tokenizer, tmp_path / "cache"), T).n_blocks
    taken(source(corpus, tokenizer), 0, 5 * n)
    ending = source(corpus, tokenizer, epochs=2)
    taken(ending, 0, 2 * n)
    with pytest.raises(RunError, match=rf"source 'a' has come to its end after 2 epoch\(s\) and {2 * n} sequences"):
        ending.sample(2 * n)
