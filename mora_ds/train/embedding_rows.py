"""Which rows of embeddings and head a domain needs: --train_embedding_rows K.

a new run        the K tokens whose share of the text grows most from the sources of --replay to the others, counted by
                 rank 0 in their token caches
a resumed run    the rows of its checkpoint
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mora_ds.adapters.new_embeddings import ROWS_FLAG, chosen_rows
from mora_ds.checkpoint.adapter_files import read_adapter
from mora_ds.common.errors import UserError
from mora_ds.data import Mixture, PackedDataset
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

CHUNK = 2**24
"""Tokens that are counted at a time."""


def embedding_rows(
    count: int, vocabulary: int, mixture: Mixture, replayed: Sequence[str], checkpoint: Path | None, ranks: Ranks
) -> tuple[int, ...]:
    """`count` of the `vocabulary` rows, ascending; the same on every process. Collective.

    `replayed`: names of the sources of what the base knows. Raises `UserError` for a source that is streamed, more rows
    than there are, and a checkpoint of a run with another number of rows.
    """

    def choose() -> list[int]:
        if checkpoint is None:
            return most_grown(count, vocabulary, mixture, replayed)
        saved = chosen_rows(read_adapter(checkpoint).facts)
        if len(saved) != count:
            raise UserError(f"{ROWS_FLAG} {count}: {checkpoint} belongs to a run with {len(saved)} rows")
        return saved

    return tuple(ranks.on_first("rows of the embeddings", choose, long=True))


def most_grown(count: int, vocabulary: int, mixture: Mixture, replayed: Sequence[str]) -> list[int]:
    """The tokens whose share of the text grows most from the replayed sources to the others, ascending."""
    if count >= vocabulary:
        raise UserError(f"{ROWS_FLAG} {count}: the model has {vocabulary} rows; --train_embeddings trains them all")
    known, new = np.zeros(vocabulary, np.int64), np.zeros(vocabulary, np.int64)
    for name, source in zip(mixture.names, mixture.sources, strict=True):
        if not isinstance(source, PackedDataset):
            raise UserError(f"{ROWS_FLAG}: the tokens of source {name!r}, which is streamed, cannot be counted")
        counts, tokens = known if name in replayed else new, source.cache.tokens
        for start in range(0, len(tokens), CHUNK):
            counts += np.bincount(tokens[start : start + CHUNK], minlength=vocabulary)
    shares = known / known.sum(), new / new.sum()
    rows = np.sort(np.argsort(shares[0] - shares[1], kind="stable")[:count])
    before, now = (f"{share[rows].sum():.1%}" for share in shares)
    logger.info(f"{ROWS_FLAG} {count}: their tokens are {before} of the replayed text and {now} of the new text")
    found: list[int] = rows.tolist()
    return found
