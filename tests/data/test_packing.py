"""Packing: every token once an epoch, documents apart, and batches that only depend on
seed, step and batch size.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices

from mora_ds.data import IGNORED, Mixture, PackedDataset, TokenCache
from mora_ds.data.documents import Documents
from tests.helpers.errors import user_error

EOS = 9999
RECORDED = [4, 3, 2, 8, 6, 1, 5, 0, 7, 9, 9, 2, 3, 4, 5, 7, 8, 1, 0, 6]
LENGTHS = [5, 1, 1, 17, 8, 30, 2, 8, 16, 3, 1]

KEYS = ("input_ids", "labels", "position_ids")


def make_cache(lengths):
    """Tokens are numbered, so that each can be found again."""
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = np.arange(ends[-1], dtype=np.uint16)
    return TokenCache(Path("memory"), {"settings": {"eos_id": EOS}}, tokens, ends)


def batches_of(data, size):
    """The batches that a run draws from one plain source."""
    return Mixture({"train": data}, [(0, (1.0,))], [None], data.seq_len, size)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 16, 91, 92, 93, 200])
def test_each_token_is_predicted_once_from_the_one_before_it(seq_len, mask):
    cache = make_cache(LENGTHS)
    data = PackedDataset(cache, seq_len, document_mask=mask)
    predicted = []
    read = []
    for index in range(data.n_blocks):
        block = data.block(index)
        assert all(
            value.shape == (seq_len,) and value.dtype == np.int64
            for value in block.values()
        )
        real = block["labels"] != IGNORED
        predicted += block["labels"][real].tolist()
        assert np.array_equal(block["labels"][real], block["input_ids"][real] + 1)
        read += [token for token in block["input_ids"].tolist() if token != EOS]
        assert mask or block["position_ids"].tolist() == list(range(seq_len)), (
            "positions run through"
        )
    starts = {0, *cache.ends.tolist()} if mask else {0}
    assert predicted == [
        token for token in range(cache.n_tokens) if token not in starts
    ]
    # The very last predicts nothing
    assert read in (list(range(cache.n_tokens)), list(range(cache.n_tokens - 1)))


@pytest.mark.parametrize("start", [7777, 0])
@pytest.mark.parametrize("mask", [True, False])
def test_every_block_begins_with_a_block_start(mask, start):
    """The block start replaces a token that the previous block has predicted; the token
    after it is not predicted. All else is unchanged."""
    cache = make_cache(LENGTHS)
    documents = [0, *cache.ends[:-1].tolist()]
    cache.tokens[documents] = start
    data = PackedDataset(cache, 7, document_mask=mask, block_start=start)
    plain = PackedDataset(cache, 7, document_mask=mask)
    begun = 0
    for index in range(data.n_blocks):
        block = data.block(index)
        other = plain.block(index)
        assert block["input_ids"][0] == start
        assert np.array_equal(block["input_ids"][1:], other["input_ids"][1:])
        assert np.array_equal(block["labels"][1:], other["labels"][1:])
        assert np.array_equal(block["position_ids"], other["position_ids"])
        if index * 7 in documents:
            assert block["labels"][0] == other["labels"][0] != IGNORED
            begun += 1
        else:
            assert block["labels"][0] == IGNORED
    assert 0 < begun < data.n_blocks


@pytest.mark.parametrize("seq_len", [2, 7, 8, 16, 93, 200])
def test_document_mask_keeps_documents_and_padding_apart(seq_len):
    """transformers reads the positions so: two tokens are in one sequence if and only
    if they are in one document of the block."""
    cache = make_cache(LENGTHS)
    data = PackedDataset(cache, seq_len)
    owner = np.searchsorted(cache.ends, np.arange(cache.n_tokens), side="right")
    for index in range(data.n_blocks):
        block = data.block(index)
        tokens = block["input_ids"]
        real = int((tokens != EOS).sum())
        documents = np.concatenate([owner[tokens[:real]], np.full(seq_len - real, -1)])
        packed = find_packed_sequence_indices(
            torch.from_numpy(block["position_ids"])[None]
        )
        sequences = np.zeros(seq_len) if packed is None else packed[0].numpy()
        assert (
            (sequences[:, None] == sequences) == (documents[:, None] == documents)
        ).all()
        position = block["position_ids"].tolist()
        for offset in range(seq_len):
            fresh = offset == 0 or documents[offset] != documents[offset - 1]
            assert position[offset] == (0 if fresh else position[offset - 1] + 1)
        assert (block["labels"][real:] == IGNORED).all()


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_a_batch_is_the_same_for_any_number_of_ranks(world):
    reference = batches_of(PackedDataset(make_cache(LENGTHS), 7, seed=1), 12)
    rows = 12 // world
    for step in (0, 1, 7, 10**6):
        rank_batches = []
        # Each rank has a dataset of its own and asks in another order
        for rank in reversed(range(world)):
            of_rank = batches_of(PackedDataset(make_cache(LENGTHS), 7, seed=1), 12)
            local = of_rank.batch(step, slice(rank * rows, (rank + 1) * rows))
            assert local["labels"].shape == (rows, 7)
            rank_batches.insert(0, local)
        batch = reference.batch(step)
        for key in KEYS:
            assert torch.equal(
                batch[key], torch.cat([local[key] for local in rank_batches])
            )
        assert batch["documents"].lengths == sum(
            (local["documents"].lengths for local in rank_batches), ()
        )


def test_the_order_is_drawn_from_the_seed_and_never_changes():
    """Recorded numbers: a run of today must resume tomorrow."""
    drawn = {
        seed: [
            PackedDataset(make_cache([80]), 8, seed).sample(number)["input_ids"][0] // 8
            for number in range(20)
        ]
        for seed in (42, 43)
    }
    assert drawn[42] == RECORDED != drawn[43]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_meets_every_block_once_over_all_ranks(world, batch_size):
    data = PackedDataset(make_cache(LENGTHS), 7)
    ranks = [list(data.eval_batches(rank, world, batch_size)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [
        row
        for batches in ranks
        for batch in batches
        for row in zip(*map(batch.get, KEYS), strict=True)
    ]
    assert all(
        batch["labels"].shape == (batch_size, 7)
        for batches in ranks
        for batch in batches
    )
    real = sorted(
        (row for row in rows if (row[1] != IGNORED).any()),
        key=lambda row: int(row[0][0]),
    )
    assert [int(row[0][0]) for row in real] == [
        7 * index for index in range(data.n_blocks)
    ]
    for index, row in enumerate(real):
        assert all(
            np.array_equal(mine, right)
            for mine, right in zip(row, data.block(index).values(), strict=True)
        )
    assert len(rows) - len(real) < world * batch_size


def test_a_corpus_shorter_than_one_batch():
    data = PackedDataset(make_cache([50]), 8)
    batches_of(data, 7).check_batch_size()
    with user_error(
        "it makes 7 sequences of --seq_len 8, one global batch takes 8; give"
    ):
        batches_of(data, 8).check_batch_size()
    with user_error("too short"):
        PackedDataset(make_cache([1]), 8)


def test_documents_begin_with_rows_and_where_positions_restart():
    positions = torch.tensor(
        [[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 8, 9], [0, 1, 0, 0, 1, 2]]
    )
    documents = Documents.of(positions)
    assert documents.lengths == (3, 2, 1, 6, 2, 1, 3)
    assert documents.longest == 6
    assert documents.tokens == 18
    assert documents.bounds.tolist() == [0, 3, 5, 6, 12, 14, 15, 18]
    assert documents.bounds.dtype is torch.int32
    reference = Documents.one_per_sequence(3, 6)
    assert reference.bounds.tolist() == [0, 6, 12, 18]
    assert reference.lengths == (6, 6, 6)


def test_a_batch_knows_its_documents():
    data = PackedDataset(make_cache(LENGTHS), 7, seed=1)
    batches = batches_of(data, 12)
    for batch in (
        batches.batch(3),
        batches.first_sequences(2),
        *data.eval_batches(0, 2, 3),
    ):
        assert batch["documents"].lengths == Documents.of(batch["position_ids"]).lengths
        assert batch["documents"].tokens == batch["input_ids"].numel()
    crossing = PackedDataset(make_cache(LENGTHS), 7, seed=1, document_mask=False)
    assert batches_of(crossing, 4).batch(0)["documents"].lengths == (7,) * 4
