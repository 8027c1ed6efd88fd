"""Cuts the token stream into blocks (sequences) and draws training samples from them, as
a pure function of seed and sample number.

Shapes: N tokens of the cache, T = seq_len, n_blocks = ceil((N - 1) / T), batch size B.

    stream      t0 t1 t2 ... t(N-1)                 [BOS] document EOS [BOS] document EOS ...
    block i     inputs  t(iT) ... t(iT+T-1)         labels  t(iT+1) ... t(iT+T)    already shifted: do not shift again
                `block_start`, if any, replaces the first input t(iT) of every block
    epoch e     a permutation of the blocks, computed from (seed, e)
    sample n    block n in the concatenation of all epochs

Every token is predicted once per epoch, except those without context: the first token of
the stream; with the document mask the first token of each document; with a `block_start`
the second token of a block that starts within a document.

`block_start` is for models that predict badly unless a sequence starts with BOS
(`tokenizer.block_start`). The token that it replaces is still the last label of the
previous block.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.data.cache import JoinedCache, TokenCache
from mora_ds.data.documents import Documents
from mora_ds.data.order import shuffled

IGNORED = -100
"""Label of positions without a loss."""

ORDER_CHUNK = 1024
"""Blocks whose order is computed at once."""

Block = dict[str, np.ndarray]
"""input_ids, labels and position_ids of one sequence, each int64 (T,)."""


def pack(
    tokens: np.ndarray,
    document_starts: np.ndarray,
    seq_len: int,
    eos_id: int,
    document_mask: bool,
    block_start: int | None,
) -> Block:
    """A block from up to T + 1 consecutive tokens; the last token is only a label.

    `document_starts`: offsets, at least 1, where documents start. A short block is
    padded with label -100; with the document mask the positions of the padding restart
    at 0, so that it is a separate document. A document that started in an earlier block
    also starts at position 0, because its first tokens are out of reach. `block_start`:
    the token that replaces the first input; its own label is then -100.
    """
    real = len(tokens) - 1
    inputs = np.full(seq_len, eos_id, dtype=np.int64)
    labels = np.full(seq_len, IGNORED, dtype=np.int64)
    inputs[:real] = tokens[:-1]
    labels[:real] = tokens[1:]
    if block_start not in (None, tokens[0]):
        inputs[0] = block_start
        labels[0] = IGNORED
    positions = np.arange(seq_len, dtype=np.int64)
    if document_mask:
        labels[document_starts[document_starts <= real] - 1] = IGNORED
        # For each position the start of its document within the block.
        begins = np.zeros(seq_len, dtype=np.int64)
        within = document_starts[document_starts < real]
        begins[within] = within
        begins[real:] = real
        positions -= np.maximum.accumulate(begins)
    return {"input_ids": inputs, "labels": labels, "position_ids": positions}


class PackedDataset:
    """Blocks of one token cache, as samples for training and batches for evaluation."""

    def __init__(
        self,
        cache: TokenCache | JoinedCache,
        seq_len: int,
        seed: int | str = 0,
        document_mask: bool = True,
        block_start: int | None = None,
    ) -> None:
        """Raise `UserError` for a cache of fewer than 2 tokens."""
        if cache.n_tokens < 2:
            raise UserError(
                "the corpus is too short: a single token has nothing to predict"
            )
        self.cache = cache
        self.seq_len = seq_len
        self.seed = seed
        self.document_mask = document_mask
        self.block_start = block_start
        self.n_blocks: int = -(-(cache.n_tokens - 1) // seq_len)
        """Blocks (sequences) per epoch."""
        # A batch may contain samples of two epochs.
        self._order = lru_cache(maxsize=2)(self._order_of_chunk)

    def block(self, index: int) -> Block:
        """Block `index` of the stream, unshuffled."""
        start = index * self.seq_len
        tokens, ends = self.cache.window(start, start + self.seq_len + 1)
        return pack(
            tokens,
            ends,
            self.seq_len,
            self.cache.eos_id,
            self.document_mask,
            self.block_start,
        )

    def sample(self, number: int) -> Block:
        """Sample `number` of the endless training order."""
        epoch, position = divmod(number, self.n_blocks)
        chunk, index = divmod(position, ORDER_CHUNK)
        return self.block(int(self._order(epoch, chunk)[index]))

    def _order_of_chunk(self, epoch: int, chunk: int) -> np.ndarray:
        """The blocks at the positions of one chunk of an epoch."""
        first = chunk * ORDER_CHUNK
        positions = np.arange(first, min(first + ORDER_CHUNK, self.n_blocks))
        return shuffled(self.seed, epoch, self.n_blocks, positions)

    def peek(self, index: int) -> Block:
        """Sequence `index` of the unshuffled stream, which is repeated after its
        end."""
        return self.block(index % self.n_blocks)

    @property
    def content_id(self) -> str:
        """An identity of the tokens: the token cache's key."""
        return self.cache.key

    def eval_batches(
        self, rank: int, world: int, batch_size: int
    ) -> Iterator[dict[str, Tensor]]:
        """This rank's part of all blocks, in order; each block is on exactly one rank.
        Every rank yields the same number of batches of `batch_size` sequences, padded
        with empty sequences at the end."""
        eos_id = self.cache.eos_id
        no_starts = np.empty(0, np.int64)
        padding = pack(np.array([eos_id]), no_starts, self.seq_len, eos_id, False, None)
        global_batch_size = world * batch_size
        for round_start in range(0, self.n_blocks, global_batch_size):
            first = round_start + rank * batch_size
            stop = min(first + batch_size, self.n_blocks)
            blocks = [self.block(index) for index in range(first, stop)]
            yield stack(blocks + [padding] * (batch_size - len(blocks)))


def stack(blocks: Sequence[Block]) -> dict[str, Any]:
    """A batch (B, T) of blocks (T,), with its `Documents` as `documents`."""
    batch = {
        key: torch.from_numpy(np.stack([block[key] for block in blocks]))
        for key in blocks[0]
    }
    return {**batch, "documents": Documents.of(batch["position_ids"])}
