"""Streams of small documents, for the tests of streaming."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from mora_ds.data import DocumentStream, Encoder, StreamSource

T = 16


class Letters:
    """A tokenizer with a token a letter, "a" being 1."""

    bos_token_id = None
    eos_token_id = 0

    def __call__(self, text, **anything):
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def documents(count=90):
    """Documents of all lengths, with empty ones among them."""
    return [
        "" if n % 17 == 3 else f"document {n}: " + "def f(x): return x\n" * (n * n % 23)
        for n in range(count)
    ]


def write(folder, kind, texts):
    """Three shards of one format."""
    folder.mkdir()
    for number in range(3):
        shard = texts[number::3]
        path = folder / f"{number}.{kind}"
        lines = "".join(
            json.dumps({"id": 1, "text": text}) + "\n" for text in shard
        ).encode()
        match kind:
            case "jsonl":
                path.write_bytes(lines)
            case "jsonl.gz":
                path.write_bytes(gzip.compress(lines))
            case "jsonl.zst":
                path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
            case "parquet":
                pyarrow.parquet.write_table(
                    pa.table({"text": shard}), path, row_group_size=7
                )
            case _:
                path.write_text("".join(shard))
    return [str(folder / f"*.{kind}")]


def source(corpus, tokenizer, buffer=0, mask=True, **more):
    return StreamSource(
        DocumentStream("a", corpus, buffer, "5/a"),
        Encoder.of(tokenizer),
        T,
        mask,
        None,
        **more,
    )


def taken(stream, first, last):
    return stream.take(last - first)


def assert_equal(one, another):
    for mine, expected in zip(one, another, strict=True):
        for key in expected:
            assert np.array_equal(mine[key], expected[key]), key
