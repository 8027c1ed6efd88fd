"""Streaming: failures, damage and ends are named."""

import gzip
import random

import pyarrow as pa
import pytest
from huggingface_hub.errors import HTTPError

from mora_ds.common.errors import RunError
from mora_ds.data import (
    Corpus,
    DocumentStream,
    load_corpus,
    readers,
)
from mora_ds.data.stream import StreamPosition
from tests.helpers.errors import user_error
from tests.helpers.streams import documents, source, taken, write
from tests.helpers.texts import json_lines


class Broken:
    """A member that fails as disks and networks do, before record 5."""

    def __init__(self, shard, error):
        self.member = shard
        self.error = error
        self.label = shard.label

    def documents_after(self, mark):
        for document, behind in self.member.documents_after(mark):
            if behind.record == 5:
                raise self.error
            yield document, behind


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), HTTPError("no route to host")], ids=repr
)
def test_a_part_that_cannot_be_read_any_more_is_named(tokenizer, tmp_path, error):
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", documents()))
    broken_shards = tuple(Broken(shard, error) for shard in corpus.members)
    with pytest.raises(
        RunError, match=r"source 'a': .*0.jsonl cannot be read: .*(output error|route)"
    ):
        taken(source(Corpus(broken_shards), tokenizer), 0, 300)


def test_a_disk_that_fails_in_a_file_is_no_mistake_of_the_user(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(116, "Stale file handle")

    documents_of = DocumentStream(
        "a", load_corpus(write(tmp_path / "shards", "jsonl", documents()))
    )
    monkeypatch.setattr(readers, "_lines", fail)
    with pytest.raises(
        RunError, match=r"source 'a': .*\.jsonl cannot be read: .*Stale file handle"
    ):
        list(documents_of.epoch(StreamPosition()))


def test_damage_in_the_middle_is_named(tokenizer, tmp_path):
    lines = json_lines(documents()).splitlines()
    (tmp_path / "broken.jsonl").write_text(
        "\n".join([*lines[:40], '{"text": 5', *lines[40:]])
    )
    with user_error(r"source 'a': .*broken.jsonl, line 41, column"):
        taken(source(load_corpus([str(tmp_path / "broken.jsonl")]), tokenizer), 0, 2000)
    numbers = random.Random(0)  # do not compress
    texts = (numbers.randbytes(1000).hex() for _ in range(900))
    content = json_lines(texts).encode()
    gz = gzip.compress(content)
    zst = pa.compress(content, "zstd", asbytes=True)
    for name, damaged in {
        "a.gz": gz[:-40],
        "b.gz": gz[:-8] + bytes(4) + gz[-4:],
        "c.zst": zst[:-40],
    }.items():
        path = tmp_path / f"damaged.jsonl.{name[2:]}"  # in b.gz the checksum
        path.write_bytes(damaged)
        documents_of = DocumentStream("a", load_corpus([str(path)]))
        with user_error(rf"source 'a': .*{path.name} cannot be read"):
            list(documents_of.epoch(StreamPosition()))
