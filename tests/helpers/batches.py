"""Batches whose rows hold several documents."""

from mora_ds.data import IGNORED
from mora_ds.data.documents import Documents
from tests.helpers.attention import positions_of
from tests.helpers.models import tokens

LENGTH = 40
"""More than three of the tiny models' sliding windows."""
LAYOUTS = {1: [[9, 1, 23, 7]], 4: [[9, 1, 23, 7], [LENGTH], [5] * 8, [39, 1]]}
"""Rows -> the lengths of the documents in each."""


def batch_of(rows):
    """1 or 4 rows with their documents, as `data.packing.stack` makes them."""
    ids = tokens(rows, LENGTH + 1)
    positions = positions_of(LAYOUTS[rows])
    labels = ids[:, 1:].clone()
    labels[:, :-1][positions[:, 1:] == 0] = IGNORED
    documents = Documents.of(positions)
    return {
        "input_ids": ids[:, :-1],
        "labels": labels,
        "position_ids": positions,
        "documents": documents,
    }
