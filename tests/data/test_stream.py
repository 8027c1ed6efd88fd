"""Streaming: the same blocks as from a cache, resumed at any position. Its failures are in
test_stream_failures.py.
"""

import json

import pytest
import torch

from mora_ds.common.errors import RunError
from mora_ds.common.object_store import object_facts
from mora_ds.data import (
    Corpus,
    DocumentStream,
    Mixture,
    PackedDataset,
    build_cache,
    load_corpus,
    readers,
    remote_files,
    stream,
)
from mora_ds.data.readers import START
from mora_ds.data.stream import StreamPosition
from tests.helpers.jobs import job, validation_errors_of
from tests.helpers.mixtures import source_rows
from tests.helpers.resume import assert_one_run
from tests.helpers.streams import T, assert_equal, documents, source, taken, write


class InOrder(PackedDataset):
    """A source whose epochs have the order of its tokens."""

    def sample(self, number):
        return self.block(number % self.n_blocks)


KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "dataset")


def corpus_of(folder, kind="jsonl", count=90):
    """Three shards of one format, or a `datasets` name (a folder in place of one of the
    hub) that is streamed.
    """
    if kind != "dataset":
        return load_corpus(write(folder, kind, documents(count)))
    write(folder, "jsonl", documents(count))
    return load_corpus(dataset_name=str(folder), streaming=True)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_text_at_a_url_is_that_on_a_disk(tmp_path, kind, monkeypatch):
    """Read in short ranges, from any position."""
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 100)
    on_disk = corpus_of(tmp_path / "shards", kind, 20)
    (tmp_path / "shards/notes.unknown").write_text("no text")
    url = f"file://{tmp_path}/shards/"
    at_url = load_corpus([url, f"{url}*.{kind}"])
    assert list(at_url) == list(on_disk), "each file once"
    for member, own in zip(at_url.members, on_disk.members, strict=True):
        assert member.label == f"file://{own.label}"
        assert member.content_hash() == own.content_hash()
        assert member.size_bytes() == own.size_bytes()
        for _, mark in own.documents_after(START):
            rest = list(own.documents_after(mark))
            assert list(member.documents_after(mark)) == rest


@pytest.mark.parametrize("keeps", [slice(1), slice(None, None, -1)])
def test_text_at_a_url_that_changes_after_the_start_is_named(tmp_path, keeps):
    """Cut, or another one of the same size."""
    corpus = load_corpus(
        [f"file://{write(tmp_path / 'shards', 'jsonl', documents())[0]}"]
    )
    path = tmp_path / "shards/1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[keeps]))
    with pytest.raises(RunError, match=r"jsonl was changed after this run"):
        list(corpus)


@pytest.mark.parametrize("name", ["ETag", "Last-Modified", "blob_id"])
def test_another_text_of_the_same_size_is_another_version(name):
    """As S3, web servers and the hub tell it."""
    one, another = ({"size": 3, name: version} for version in "ab")
    assert object_facts(one) != object_facts(another)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_cache_token_by_token(tokenizer, tmp_path, kind, mask):
    """Over two epochs: also their seams, paddings and positions."""
    corpus = corpus_of(tmp_path / "shards", kind)
    files = load_corpus([f"{tmp_path}/shards/*"])
    cache = build_cache(files, tokenizer, tmp_path / "cache")
    first = tokenizer.bos_token_id if mask else None
    cached = InOrder(cache, T, document_mask=mask, block_start=first)
    blocks = [cached.sample(number) for number in range(2 * cached.n_blocks + 3)]
    streamed = source(corpus, tokenizer, mask=mask, block_start=first)
    assert_equal([streamed.peek(number) for number in range(9)], blocks[:9])
    assert_equal(taken(streamed, 0, len(blocks)), blocks)


@pytest.mark.parametrize("buffer", [0, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_resumed_at_any_sample(
    tokenizer, tmp_path, kind, buffer, monkeypatch
):
    """Through JSON, as in a checkpoint, again and again with a new source."""
    monkeypatch.setattr(readers, "BATCH_CHARACTERS", 900)
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 800)
    monkeypatch.setattr(readers, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(stream, "IN_ORDER_WINDOW", 4)
    corpus = corpus_of(tmp_path / "shards", kind, 60)
    reference = taken(source(corpus, tokenizer, buffer), 0, 700)
    state = source(corpus, tokenizer, buffer).state()
    for number in range(0, 700, 7):
        fresh = source(corpus, tokenizer, buffer)
        fresh.restore(json.loads(json.dumps(state)))
        assert_equal(taken(fresh, number, number + 7), reference[number : number + 7])
        state = fresh.state()


def read(corpus, buffer, epoch=0, seed=3):
    """The documents of an epoch, which are numbers."""
    reader = DocumentStream("a", corpus, buffer=buffer, seed=seed)
    position = StreamPosition(epoch=epoch)
    return [int(document.text) for document, _ in reader.epoch(position)]


def test_windows_are_shuffled_anew_each_epoch_and_hold_each_document_once(tmp_path):
    corpus = load_corpus(
        write(tmp_path / "shards", "jsonl", [f"{n}" for n in range(50)])
    )
    first, *later = (read(corpus, 8, epoch) for epoch in range(3))
    for another in (*later, read(corpus, 8, seed=4)):
        assert sorted(another) == sorted(first) == list(range(50))
        assert another != first
    of_one_file = read(Corpus(corpus.members[:1]), buffer=4)
    windows = [of_one_file[start : start + 4] for start in range(0, 16, 4)]
    assert [sorted(window) for window in windows] == [
        list(range(start, start + 12, 3)) for start in range(0, 48, 12)
    ]
    orders = {tuple(number // 3 % 4 for number in window) for window in windows}
    assert len(orders) > 1, "each window has its own order"
    firsts = {read(corpus, 1, epoch)[0] for epoch in range(8)}
    assert firsts == {0, 1, 2}, "each epoch has its own order of files"


def test_a_window_of_much_text_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_CHARACTERS", 50)
    corpus = load_corpus(write(tmp_path / "shards", "jsonl", ["x" * 20] * 30))
    positions = [
        position for _, position in DocumentStream("a", corpus).epoch(StreamPosition())
    ]
    assert [(position.window, position.done) for position in positions] == [
        divmod(number, 3) for number in range(30)
    ]


def test_a_document_longer_than_memory_passes_in_chunks(
    tokenizer, tmp_path, monkeypatch
):
    """At most a chunk and a batch of it are in memory."""
    monkeypatch.setattr(readers, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "_READ_BYTES", 500)
    monkeypatch.setattr(readers, "BATCH_CHARACTERS", 2000)
    (tmp_path / "a.txt").write_text("short\n")
    (tmp_path / "b.txt").write_text(
        "".join(f"line {n} of a long, long text\n" for n in range(3000))
    )
    corpus = load_corpus([str(tmp_path / "*.txt")])
    cached = InOrder(build_cache(corpus, tokenizer, tmp_path / "cache"), T)
    streamed = source(corpus, tokenizer, buffer=50)
    longest_queue = 0
    for _ in range(cached.n_blocks):
        (block,) = streamed.take(1)
        queue = streamed.shards[0].queue
        longest_queue = max(longest_queue, sum(len(chunk.tokens) for chunk in queue))
    assert longest_queue < 3000 < cached.cache.n_tokens / 10
    assert block["labels"].shape == (T,)
    blocks = [cached.block(number) for number in range(cached.n_blocks)]
    assert_equal(taken(source(corpus, tokenizer), 0, len(blocks)), blocks)


# -- mixtures --------------------------------------------------------------------------


def test_a_mixture_of_streams_and_caches(tokenizer, tmp_path):
    """Batches equal those of the same mixture from caches, for rows of any rank, resumed at
    any step.
    """
    left = corpus_of(tmp_path / "left", count=70)
    right = load_corpus(write(tmp_path / "right", "txt", documents(40)[20:]))
    packed = [
        InOrder(build_cache(corpus, tokenizer, tmp_path / "cache"), T)
        for corpus in (left, right)
    ]

    def mixture(left_source, states=None):
        phases = [(0, (0.7, 0.3)), (9, (0.2, 0.8))]
        sources = {"left": left_source, "right": packed[1]}
        return Mixture(sources, phases, [None, None], T, 12, states)

    def made(states=None):
        return mixture(source(left, tokenizer), states)

    cached = mixture(packed[0])
    reference = made()
    state = None
    for step in range(20):
        if step % 3 == 0:
            resumed = made(json.loads(json.dumps(state)) if state else None)
        # Ranks and micro-batches, some twice
        for row_range in (slice(6, 12), slice(0, 6), slice(0, 6)):
            wanted = cached.batch(step, row_range)
            batch = reference.batch(step, row_range)
            for key in ("input_ids", "labels", "position_ids"):
                assert torch.equal(batch[key], wanted[key])
                assert torch.equal(resumed.batch(step, row_range)[key], wanted[key])
        assert resumed.states_at(step) == reference.states_at(step)
        state = resumed.states_at(step + 1)
    late = made()
    assert torch.equal(late.batch(7)["input_ids"], cached.batch(7)["input_ids"]), (
        "a walk to a later step"
    )


# -- complete runs ---------------------------------------------------------------------


def test_a_streamed_run_is_the_same_on_two_ranks_and_after_two_resumes(
    user, tmp_path, out
):
    more = (
        f"--streaming --shuffle_buffer 7 --save_steps 2 --replay old={user.held}:0.25"
    )

    def flags(folder, *batch):
        return user.flags(folder, more, *batch)

    assert_one_run(flags, tmp_path, job_in_small_batches)
    assert source_rows(tmp_path / "wide")[-1]["old"]["tokens"] == 6 * 32
    resumed = flags(
        out, "--per_device_train_batch_size 4 --resume_from_checkpoint auto"
    )
    message = validation_errors_of([*resumed, "--shuffle_buffer", "8"])
    assert "--shuffle_buffer" in message
    assert "train.shuffle_buffer: 7 there, 8 here" in message


def job_in_small_batches(argv):
    """So that each rank tokenizes some."""
    readers.BATCH_CHARACTERS = 2000
    job(argv)
