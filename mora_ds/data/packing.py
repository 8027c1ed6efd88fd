"""The token stream -> packed (T,) blocks -> (B, T) batches, as a pure function of (seed, step, global batch size).

Shape legend: N tokens of the cache, T = seq_len, n_blocks = ceil((N - 1) / T).

    stream      t0 t1 t2 ... t(N-1)                 [BOS] document EOS [BOS] document EOS ...
    block i     inputs  t(iT) ... t(iT+T-1)         labels  t(iT+1) ... t(iT+T)    already shifted: do not shift again
    epoch e     a permutation of the blocks, drawn from (seed, e)
    step s      samples s*G ... s*G + G-1 of the epochs laid end to end, G = global batch size

So every token but the very first is predicted once an epoch (with the document mask, the first token of each document
is not: nothing before it belongs to it), and no rank needs to know how many others there are.

A `TokenBlocks` is one source; what draws from it only needs `n_blocks` and `block(i)`, so that a mixture of sources
can stand in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mora_ds.data.cache import TokenCache
from mora_ds.errors import UserError

IGNORED = -100
"""Label of positions that predict nothing."""

_KEYS = ("input_ids", "labels", "position_ids")


class TokenBlocks:
    """Blocks of T tokens, cut from the cache in order."""

    def __init__(self, cache: TokenCache, seq_len: int, document_mask: bool = True) -> None:
        if seq_len < 1:
            raise UserError(f"--seq_len must be at least 1, got {seq_len}")
        if cache.n_tokens < 2:
            raise UserError("the corpus is too short: a single token has nothing to predict")
        self.cache = cache
        self.seq_len = seq_len
        self.document_mask = document_mask
        self.n_blocks = -(-(cache.n_tokens - 1) // seq_len)

    def block(self, index: int) -> dict[str, np.ndarray]:
        """input_ids, labels and position_ids, each int64 (T,).

        The last block is padded: label -100 and, with the document mask, positions that start again at 0, so that the
        padding is a document of its own. A document that began in an earlier block starts again at position 0 too:
        what came before is out of its sight.
        """
        if not 0 <= index < self.n_blocks:
            raise IndexError(f"block {index} of {self.n_blocks}")
        start = index * self.seq_len
        stream = self.cache.tokens[start : start + self.seq_len + 1].astype(np.int64)
        real = len(stream) - 1
        inputs = np.full(self.seq_len, self.cache.eos_id, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORED, dtype=np.int64)
        inputs[:real], labels[:real] = stream[:-1], stream[1:]
        positions = np.arange(self.seq_len, dtype=np.int64)
        if self.document_mask:
            starts = self._document_starts(start, real)
            labels[starts - 1] = IGNORED
            positions -= _last_start(starts[starts < real], real, self.seq_len)
        return dict(zip(_KEYS, (inputs, labels, positions), strict=True))

    def padding(self) -> dict[str, np.ndarray]:
        """A block without a label, for ranks that have run out of real ones."""
        positions = np.arange(self.seq_len, dtype=np.int64)
        inputs = np.full(self.seq_len, self.cache.eos_id, dtype=np.int64)
        return dict(zip(_KEYS, (inputs, np.full_like(inputs, IGNORED), positions), strict=True))

    def _document_starts(self, start: int, real: int) -> np.ndarray:
        """Offsets 1 ... real, from `start`, at which a document begins: where its predecessor ends."""
        ends = self.cache.ends
        first, last = np.searchsorted(ends, (start + 1, start + real + 1))
        return np.asarray(ends[first:last], dtype=np.int64) - start


def _last_start(starts: np.ndarray, real: int, size: int) -> np.ndarray:
    """(size,): for every position, where its document begins within the block; the padding begins at `real`."""
    begins = np.zeros(size, dtype=np.int64)
    begins[starts] = starts
    begins[real:] = real
    return np.maximum.accumulate(begins)


class PackedDataset:
    """Batches of one cache, for training (`batch`) and for evaluation (`eval_batches`)."""

    def __init__(
        self, cache: TokenCache, seq_len: int, seed: int | str = 0, document_mask: bool = True, shuffle: bool = True
    ) -> None:
        self.blocks = TokenBlocks(cache, seq_len, document_mask)
        self.seed = seed
        self.shuffle = shuffle
        self._order = lru_cache(maxsize=2)(epoch_order)  # of this source: a batch may straddle two epochs

    @property
    def seq_len(self) -> int:
        return self.blocks.seq_len

    @property
    def n_blocks(self) -> int:
        """Sequences an epoch."""
        return self.blocks.n_blocks

    def block(self, index: int) -> dict[str, Tensor]:
        """Block `index` of the stream, unshuffled: input_ids, labels, position_ids, each int64 (T,)."""
        return {key: torch.from_numpy(value) for key, value in self.blocks.block(index).items()}

    def first_rows(self, count: int) -> dict[str, Tensor]:
        """The first `count` blocks, or as many as there are: input_ids, labels, position_ids, int64 (rows, T)."""
        return stack([self.blocks.block(index) for index in range(min(count, self.n_blocks))])

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree on."""
        return {"tokens": self.blocks.cache.folder.name}

    def check_batch_size(self, global_batch_size: int) -> None:
        """Raises `UserError` when the corpus does not fill one global batch (sequences an optimizer step)."""
        if self.n_blocks < global_batch_size:
            raise UserError(
                f"the training corpus is shorter than one batch: {self.blocks.cache.n_tokens} tokens make "
                f"{self.n_blocks} sequences of --seq_len {self.seq_len}, one global batch takes {global_batch_size}; "
                "give more --train_files, or lower --seq_len, --per_device_train_batch_size or "
                "--gradient_accumulation_steps"
            )

    def batch(self, step: int, global_batch_size: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Rows `rows` of step `step`'s global batch: input_ids, labels, position_ids, each int64 (rows, T).

        A pure function: which rank asks, and what was asked before, makes no difference.
        """
        self.check_batch_size(global_batch_size)
        samples = range(step * global_batch_size, (step + 1) * global_batch_size)[rows]
        return stack([self.blocks.block(self.block_of_sample(sample)) for sample in samples])

    def block_of_sample(self, sample: int) -> int:
        """Which block sample number `sample` of the endless training order is."""
        epoch, index = divmod(sample, self.n_blocks)
        return int(self._order(self.seed, epoch, self.n_blocks)[index]) if self.shuffle else index

    def eval_batches(self, rank: int, world: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """This rank's share of all blocks, in order, each block at exactly one rank.

        Every rank yields the same number of batches of `batch_size` rows; those that run out yield padding.
        """
        for first in range(rank * batch_size, self._padded(world * batch_size), world * batch_size):
            indices = range(first, first + batch_size)
            yield stack([self.blocks.block(i) if i < self.n_blocks else self.blocks.padding() for i in indices])

    def _padded(self, size: int) -> int:
        return -(-self.n_blocks // size) * size


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Blocks (T,) -> a batch (rows, T)."""
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in _KEYS}


def epoch_order(seed: int | str, epoch: int, n_blocks: int) -> np.ndarray:
    """A permutation of the blocks: RandomState's stream is frozen for ever (NEP 19), so a run resumes years later."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    order = np.arange(n_blocks, dtype=np.uint32 if n_blocks < 1 << 32 else np.uint64)
    np.random.RandomState(np.frombuffer(digest, dtype="<u4")).shuffle(order)
    return order
