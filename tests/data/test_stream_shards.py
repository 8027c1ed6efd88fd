"""A stream of several shards: each document once an epoch, and the same blocks on any number
of ranks, resumed on any other.
"""

import json
from collections import Counter
from itertools import pairwise

import pytest

from mora_ds.data import DocumentStream, Encoder, StreamSource, load_corpus, stream
from mora_ds.runtime.ranks import Ranks
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.streams import assert_equal, taken
from tests.helpers.texts import json_lines

T = 16
STEPS = 40


class Letters:
    """A tokenizer with a token a letter, "a" being 1."""

    def __call__(self, texts, **anything):
        return {"input_ids": [[ord(letter) - 96 for letter in text] for text in texts]}


def letters(number):
    """Digits as letters, a document of its own length."""
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:03}") + "z" * (
        number * number % 23
    )


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Nine files of very different length: eight shards, of which one has two files and
    one has no text."""
    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    folder = tmp_path / "text"
    folder.mkdir()
    texts = [letters(number) for number in range(300)]
    bounds = [0, 90, 100, 160, 161, 161, 200, 210, 290, 300]
    for number, (first, last) in enumerate(pairwise(bounds)):
        content = json_lines(texts[first:last] or [""])
        (folder / f"{number}.jsonl").write_text(content)
    return [str(folder)]


def source(files, buffer=24, **more):
    documents = DocumentStream("a", load_corpus(files), buffer, "5/a")
    encoder = Encoder(Letters(), None, 0, "<u2")
    return StreamSource(documents, encoder, T, True, None, **more)


def test_the_number_of_shards_depends_on_files_and_text(files, monkeypatch):
    def count(buffer=24):
        return len(DocumentStream("a", load_corpus(files), buffer).shards())

    assert count() == 8
    assert count(buffer=0) == 1, "the order of the files is kept"
    monkeypatch.setattr(stream, "MAX_SHARDS", 5)
    assert count() == 4
    monkeypatch.setattr(stream, "SHARD_BYTES", 1 << 20)
    assert count() == 1


def test_each_document_comes_once_an_epoch(files):
    read = Counter()
    for shard in source(files).documents.shards():
        assert shard.buffer == 3
        read.update(
            document.text for document, _ in shard.epoch(stream.StreamPosition())
        )
    assert read == Counter(letters(number) for number in range(300))


def test_shards_of_as_many_documents_are_shuffled_each_in_its_own_order(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    texts = [letters(number) for number in range(40)]
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json_lines(texts))
    orders = [
        [document.text for document, _ in shard.epoch(stream.StreamPosition())]
        for shard in source([str(tmp_path)], buffer=80).documents.shards()
    ]
    assert [sorted(order) for order in orders] == [sorted(texts)] * 2
    assert orders[0] != orders[1]


def test_the_windows_of_all_shards_have_the_text_of_one(files):
    documents = source(files).documents
    windows = [shard.window_characters for shard in documents.shards()]
    assert windows == [documents.window_characters // 8] * 8


def test_turns_leave_out_shards_that_have_ended(files):
    """The sequences of the shards, in turns."""
    streamed = source(files)
    alone = [
        [cut[0].tolist() for cut in shard.cuts(10_000)]
        for shard in source(files).shards
    ]
    wanted = [
        cuts[turn]
        for turn in range(max(map(len, alone)))
        for cuts in alone
        if turn < len(cuts)
    ]
    assert min(map(len, alone)) == 0
    got = taken(streamed, 0, len(wanted))
    assert streamed.epoch == 0
    inputs = [
        block["input_ids"][: len(cut) - 1].tolist()
        for block, cut in zip(got, wanted, strict=True)
    ]
    assert inputs == [cut[:-1] for cut in wanted]
    streamed.take(1)
    assert streamed.epoch == 1


def test_steps_of_any_size_and_resumes_at_any_sample_give_the_same(files):
    reference = taken(source(files), 0, 700)
    state = source(files).state()
    first = 0
    for size in [1, 2, 3, 5, 11, 40] * 11:
        fresh = source(files)
        fresh.restore(json.loads(json.dumps(state)))
        assert_equal(fresh.take(size), reference[first : first + size])
        state = fresh.state()
        first += size
    assert first > 600
    assert state["epoch"] >= 2
    assert_equal([source(files).peek(9)], reference[9:10])


def test_the_state_of_other_files_is_left_to_a_later_check(files):
    fresh = source(files)
    before = fresh.state()
    fresh.restore({"place": {}, "offset": 3})
    fresh.restore({"epoch": 4, "turns": [0], "shards": [{"place": {}}]})
    assert fresh.state() == before


def test_a_source_without_text_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json_lines(["", ""]))
    streamed = source([str(tmp_path)])
    assert len(streamed.shards) == 2
    with user_error("source 'a' has no text"):
        streamed.take(1)


def steps_of_a_rank(files, states, first, last):
    """Blocks of steps of 6 sequences, the state after them, and the shards that this rank
    has read."""
    stream.SHARD_BYTES = 1
    ranks = Ranks.current()
    streamed = source(files, map_over_ranks=ranks.map, ranks=ranks.world)
    if states is not None:
        streamed.restore(states)
    blocks = [block for _ in range(first, last) for block in streamed.take(6)]
    read = [number for number, shard in enumerate(streamed.shards) if shard.queue]
    inputs = [{key: value.tolist() for key, value in block.items()} for block in blocks]
    return inputs, streamed.state(), read


def test_any_number_of_ranks_gives_the_same_and_resumes_another(files):
    reference = taken(source(files), 0, 6 * STEPS)
    states = None
    first = 0
    for world, last in ((2, 13), (3, 30), (1, STEPS)):
        results = run_ranks(world, steps_of_a_rank, files, states, first, last)
        for rank, (blocks, state, read) in enumerate(results):
            assert_equal(blocks, reference[6 * first : 6 * last])
            assert state == results[0][1]
            assert read, "each rank reads some"
            assert {number % world for number in read} == {rank}
        states = json.loads(json.dumps(results[0][1]))
        first = last
