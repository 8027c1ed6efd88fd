"""Streaming: the same blocks as from a cache, resumed at any position, passing failures, errors and ends."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from mora_ds.common.errors import RunError, UserError
from mora_ds.data import (
    Corpus,
    Document,
    DocumentFilter,
    DocumentStream,
    Encoder,
    Mixture,
    PackedDataset,
    StreamMixture,
    StreamSettings,
    StreamSource,
    build_cache,
    load_corpus,
    load_tokenizer,
    readers,
    stream,
    stream_dataset,
)
from mora_ds.data.stream import StreamPosition
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, job, losses, refused, rows, run
from tests.helpers.mixtures import source_rows
from tests.helpers.resume import assert_same_run, interrupted_job

T = 16


def documents(count: int = 90) -> list[str]:
    """Of all lengths, empty ones among them."""
    return ["" if n % 17 == 3 else f"document {n}: " + "def f(x): return x\n" * (n * n % 23) for n in range(count)]


def write(folder: Path, kind: str, texts: list[str]) -> list[str]:
    """Three shards of one format."""
    folder.mkdir()
    for number in range(3):
        part, path = texts[number::3], folder / f"{number}.{kind}"
        lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in part).encode()
        table = pa.table({"text": part})
        match kind:
            case "jsonl":
                path.write_bytes(lines)
            case "jsonl.gz":
                path.write_bytes(gzip.compress(lines))
            case "jsonl.zst":
                path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
            case "parquet":
                pyarrow.parquet.write_table(table, path, row_group_size=7)
            case "arrow":
                with pa.ipc.new_stream(path, table.schema) as writer:
                    writer.write_table(table, max_chunksize=11)
            case "json":
                path.write_text(json.dumps([{"text": text} for text in part]))
            case _:
                path.write_text("".join(part))
    return [str(folder / f"*.{kind}")]


KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "json", "txt")


@pytest.fixture(scope="module")
def tokenizer(user: Playground) -> Any:
    return load_tokenizer(user.model)


def source(corpus: Corpus, tokenizer: Any, buffer: int = 0, **more: Any) -> StreamSource:
    settings = StreamSettings(buffer, "5/a", more.pop("retry_s", 0.0))
    return StreamSource(DocumentStream("a", corpus, settings), Encoder.of(tokenizer), T, True, None, **more)


def taken(stream: StreamSource, first: int, last: int) -> list[dict[str, np.ndarray]]:
    return [stream.sample(number) for number in range(first, last)]


def assert_equal(one: Any, other: Any) -> None:
    for mine, kept in zip(one, other, strict=True):
        for key in kept:
            assert np.array_equal(mine[key], kept[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_cache_token_by_token(user: Playground, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """Over two epochs: also their seams, paddings and positions."""
    corpus = load_corpus(write(tmp_path / "shards", kind, documents()))
    cached = PackedDataset(build_cache(corpus, tokenizer, tmp_path / "cache"), T, shuffle=False)
    blocks = [cached.sample(number) for number in range(2 * cached.n_blocks + 3)]
    assert_equal(taken(source(corpus, tokenizer), 0, len(blocks)), blocks)


@pytest.mark.parametrize("buffer", [0, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_resumed_at_any_sample(
    tokenizer: Any, tmp_path: Path, kind: str, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through JSON, as in a checkpoint, again and again with a new source."""
    monkeypatch.setattr(readers, "BATCH_CHARACTERS", 900)
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 800)
    monkeypatch.setattr(stream, "IN_ORDER_WINDOW", 4)
    corpus = load_corpus(write(tmp_path / "shards", kind, documents(60)))
    whole = taken(source(corpus, tokenizer, buffer), 0, 700)
    state = source(corpus, tokenizer, buffer).state()
    for number in range(0, 700, 7):
        fresh = source(corpus, tokenizer, buffer)
        fresh.restore(json.loads(json.dumps(state)))
        assert_equal(taken(fresh, number, number + 7), whole[number : number + 7])
        state = fresh.state()


def test_windows_are_shuffled_anew_each_epoch_and_hold_each_document_once(tmp_path: Path) -> None:
    texts = [f"{n}" for n in range(50)]
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", texts))
    reader = DocumentStream("a", corpus, StreamSettings(buffer=8, seed=3))
    epochs = [[document.text for document, _ in reader.epoch(StreamPosition(epoch=number))] for number in range(3)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = DocumentStream("a", corpus, StreamSettings(buffer=8, seed=4))
    assert [document.text for document, _ in other.epoch(StreamPosition())] != epochs[0]


def test_a_document_longer_than_memory_passes_in_chunks(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most a chunk and a batch of it are in memory."""
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "_READ_BYTES", 500)
    monkeypatch.setattr(readers, "BATCH_CHARACTERS", 2000)
    (tmp_path / "a.txt").write_text("short\n")
    (tmp_path / "b.txt").write_text("".join(f"line {n} of a long, long text\n" for n in range(3000)))
    corpus = load_corpus([str(tmp_path / "*.txt")])
    cached = PackedDataset(build_cache(corpus, tokenizer, tmp_path / "cache"), T, shuffle=False)
    streamed = source(corpus, tokenizer, buffer=50)
    held = 0
    for number in range(cached.n_blocks):
        block = streamed.sample(number)
        held = max(held, sum(len(part.tokens) for part in streamed._queue))
    assert held < 3000 < cached.cache.n_tokens / 10
    assert block["labels"].shape == (T,)


def test_documents_left_out_are_left_out_of_a_stream(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mora_ds.data")
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", documents()))
    corpus = Corpus(corpus.parts, keep=DocumentFilter(0.4))
    cached = PackedDataset(build_cache(corpus, tokenizer, tmp_path / "cache"), T, shuffle=False)
    wanted = [cached.block(number) for number in range(cached.n_blocks)]
    assert_equal(taken(source(corpus, tokenizer), 0, len(wanted)), wanted)
    caplog.clear()
    documents_of = DocumentStream("a", corpus, StreamSettings(buffer=10))
    kept = sum(1 for _ in documents_of.epoch(StreamPosition()))
    logged = list(caplog.messages)
    assert 0 < kept < 90 and logged[-1].startswith(f"a: {90 - kept} of 90 documents of epoch 1 are not trained on")
    assert 2 <= len(logged) <= 5 and all("documents so far" in line for line in logged[:-1])
    assert sum(1 for _ in replace(documents_of, counts=False).epoch(StreamPosition())) == kept
    assert list(DocumentStream("a", Corpus(corpus.parts), StreamSettings()).epoch(StreamPosition()))
    assert caplog.messages == logged
    nothing = source(Corpus(corpus.parts, keep=DocumentFilter(0.999999999)), tokenizer)
    with pytest.raises(UserError, match="source 'a' holds no text to train on"):
        nothing.sample(0)


class Recalled:
    """A `ParallelMap` of `width` ranks in one process."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, work: Any, count: int) -> list[Any]:
        assert count <= self.width
        return [work(number) for number in reversed(range(count))][::-1]


@pytest.mark.parametrize("width", [2, 4])
def test_how_many_tokenise_makes_no_difference(
    tokenizer: Any, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_CHARACTERS", 700)
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", documents()))
    one, other = source(corpus, tokenizer, 9), source(corpus, tokenizer, 9, parallel_map=Recalled(width))
    assert_equal(taken(other, 0, 400), taken(one, 0, 400))


def test_a_datasets_name_is_streamed_and_resumed(tokenizer: Any, tmp_path: Path) -> None:
    """A folder in place of a name of the hub."""
    files = write(tmp_path / "shards", "jsonl", documents(60))
    named = stream_dataset(str(tmp_path / "shards"), "text", "source 'a'")
    whole = taken(source(load_corpus(files), tokenizer), 0, 300)
    assert_equal(taken(source(named, tokenizer), 0, 300), whole)
    state = source(named, tokenizer).state()
    for number in range(0, 300, 50):
        fresh = source(stream_dataset(str(tmp_path / "shards"), "text", "source 'a'"), tokenizer)
        fresh.restore(json.loads(json.dumps(state)))
        assert_equal(taken(fresh, number, number + 50), whole[number : number + 50])
        state = fresh.state()
    with pytest.raises(UserError, match="no field 'body'; there are: id, text"):
        stream_dataset(str(tmp_path / "shards"), "body", "source 'a'")
    with pytest.raises(UserError, match="source 'a': '/nowhere/at/all'"):
        stream_dataset("/nowhere/at/all", "text", "source 'a'")


# -- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_of_streams_and_caches(tokenizer: Any, tmp_path: Path) -> None:
    """Batches equal those of the same mixture from caches, for rows of any rank, resumed at any step."""
    left = load_corpus(write(tmp_path / "left", "jsonl", documents(70)))
    right = load_corpus(write(tmp_path / "right", "txt", documents(40)[20:]))
    packed = [
        PackedDataset(build_cache(part, tokenizer, tmp_path / "cache"), T, shuffle=False) for part in (left, right)
    ]

    def made(states: Any = None) -> StreamMixture:
        sources = {"left": source(left, tokenizer), "right": packed[1]}
        return StreamMixture(sources, [(0, (0.7, 0.3)), (9, (0.2, 0.8))], [None, None], T, 12, states=states)

    cached = Mixture({"left": packed[0], "right": packed[1]}, [(0, (0.7, 0.3)), (9, (0.2, 0.8))], [None, None], T, 12)
    whole, state = made(), None
    for step in range(20):
        if step % 3 == 0:
            resumed = made(json.loads(json.dumps(state)) if state else None)
        for part in (slice(6, 12), slice(0, 6), slice(0, 6)):  # ranks and micro-batches, some twice
            wanted = cached.batch(step, 12, part)
            batch = whole.batch(step, 12, part)
            for key in ("input_ids", "labels", "position_ids"):
                assert torch.equal(batch[key], wanted[key])
                assert torch.equal(resumed.batch(step, 12, part)[key], wanted[key])
        assert resumed.states_at(step) == whole.states_at(step)
        state = resumed.states_at(step + 1)
    late = made()
    assert torch.equal(late.batch(7, 12)["input_ids"], cached.batch(7, 12)["input_ids"]), "a walk to a later step"


# -- what goes wrong -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ConnectionError("reset by peer")])
def test_passing_failures_are_retried(
    tokenizer: Any, tmp_path: Path, waits: list[float], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", documents()))
    whole = taken(source(corpus, tokenizer, 10), 0, 300)
    parts = tuple(Flaky(part, {5: 2, 20: 1}, error) for part in corpus.parts)
    shaky = source(Corpus(parts), tokenizer, 10, retry_s=60.0)  # type: ignore[arg-type]
    assert_equal(taken(shaky, 0, 300), whole)
    assert waits[:3] == [1.0, 2.0, 1.0], "the first wait again after every new record"
    assert all("source 'a'" in line and str(error) in line for line in caplog.messages)
    assert "after record 4" in caplog.messages[0] and "trying again in 1 s" in caplog.messages[0]


def test_a_failure_that_stays_ends_the_run(tokenizer: Any, tmp_path: Path, waits: list[float]) -> None:
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", documents()))
    parts = tuple(Flaky(part, {20: 10**6}, OSError("gone")) for part in corpus.parts)
    with pytest.raises(RunError, match=r"source 'a': .*0.jsonl cannot be read after record 19, tried for 45 s .*gone"):
        taken(source(Corpus(parts), tokenizer, retry_s=45.0), 0, 300)  # type: ignore[arg-type]
    assert sum(waits) == 45.0 and waits[:4] == [1.0, 2.0, 4.0, 8.0]


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
    content = b"".join(json.dumps({"text": random.randbytes(1000).hex()}).encode() + b"\n" for _ in range(900))
    gz, zst = gzip.compress(content), pa.compress(content, "zstd", asbytes=True)
    for name, damaged in {"a.gz": gz[:-40], "b.gz": gz[:-8] + bytes(4) + gz[-4:], "c.zst": zst[:-40]}.items():
        path = tmp_path / f"damaged.jsonl.{name[2:]}"  # in b.gz the checksum
        path.write_bytes(damaged)
        documents_of = DocumentStream("a", load_corpus([str(path)]), StreamSettings())
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


# -- complete runs ---------------------------------------------------------------------------------------------------


@pytest.mark.gloo
def test_a_streamed_run_is_the_same_on_two_ranks_and_after_two_resumes(user: Playground, tmp_path: Path) -> None:
    more = ("--streaming", "--shuffle_buffer", 7, "--save_steps", 2, "--replay", f"old={user.held}:0.25")
    whole, out, wide = tmp_path / "whole", tmp_path / "out", tmp_path / "wide"
    run(1, user.flags(whole, *more, "--per_device_train_batch_size", 4))
    argv = user.flags(out, *more, "--per_device_train_batch_size", 4, "--resume_from_checkpoint", "auto")
    for step in (3, 5):
        run_ranks(1, interrupted_job, argv, step)
    run(1, argv)
    assert_same_run(out, whole)
    argv_wide = user.flags(wide, *more, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2)
    run_ranks(2, job_in_small_batches, argv_wide)
    torch.testing.assert_close(losses(wide), losses(whole), rtol=1e-5, atol=0)
    assert source_rows(wide)[-1]["old"]["tokens"] == 6 * 32
    changed = [*argv, "--shuffle_buffer", "8"]
    kind, message = run_ranks(1, refused, changed)[0]
    assert kind == "UserError" and "sources of --mixture, train.shuffle_buffer: 7 there, 8 here" in message


def job_in_small_batches(argv: list[str]) -> None:
    """So that each rank tokenises some."""
    readers.BATCH_CHARACTERS = 2000
    job(argv)


def job_in_order(argv: list[str]) -> None:
    PackedDataset.block_of_sample = lambda self, sample: sample  # type: ignore[method-assign, assignment]
    job(argv)


@pytest.mark.gloo
def test_streamed_in_order_is_cached_in_order(user: Playground, tmp_path: Path) -> None:
    """Whole runs: the losses of a streamed run are those of its cached twin, to the bit."""
    run(1, user.flags(tmp_path / "streamed", "--streaming", "--shuffle_buffer", 0))
    run_ranks(1, job_in_order, user.flags(tmp_path / "cached"))
    assert torch.equal(losses(tmp_path / "streamed"), losses(tmp_path / "cached"))
    assert not [row for row in rows(tmp_path / "streamed") if "sources" in row]


@pytest.mark.gloo
def test_what_streaming_cannot_do_is_said_at_once(user: Playground, tmp_path: Path) -> None:
    cases = {
        (
            "--max_steps",
            -1,
        ): "--streaming: the length of a stream is unknown, so give the number of steps with --max_steps",
        ("--held_out_share", 0.1): "--held_out_share reads the complete text",
        ("--shuffle_buffer", -1): "--shuffle_buffer must be at least 0",
        ("--stream_retry_s", -1): "--stream_retry_s must be at least 0",
        ("--train_files", tmp_path / "none.jsonl"): "no file matches",
    }
    for more, said in cases.items():
        kind, message = run_ranks(1, refused, user.flags(tmp_path / "out", "--streaming", *more))[0]
        assert kind == "UserError" and said in message, message
    late = tmp_path / "late.jsonl"
    late.write_text(user.train.read_text()[:20_000].rpartition("\n")[0] + '\n{"body": "x"}\n')
    argv = user.flags(tmp_path / "out", "--streaming", "--train_files", late, "--shuffle_buffer", 3, "--max_steps", 300)
    kind, message = run_ranks(1, refused, argv)[0]
    assert kind == "UserError" and "late.jsonl, line" in message and "no field 'text'; there are: body" in message
