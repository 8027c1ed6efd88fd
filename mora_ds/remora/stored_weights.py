"""Which tensors of the base's files an adapted layer changes, and what each becomes:
one at a time, for exports and for new bases.

A linear layer is one tensor. The experts of a layer may be a tensor each, or two, gate
and up, whose rows follow each other: then the update of an expert belongs to its parts
together, and each takes its rows of the sum.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mora_ds.adapters.ops.spec import Update
from mora_ds.adapters.ops.updates import merged_weight
from mora_ds.common.tensor_files import Shape
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.stored_names import is_stack
from mora_ds.remora.ledger import LayerEntry


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the base's files that a layer changes."""

    entry: LayerEntry
    keys: tuple[str, ...]
    """The keys of the tensors that are changed together, in the order of their rows."""
    rows: slice
    """The rows of this one."""
    expert: int | None = None
    """The number of their expert; None where the tensor is a layer's weight itself."""

    def merged(
        self,
        read: Callable[[str], Tensor],
        updates: Iterable[Update],
        dtype: torch.dtype,
    ) -> Tensor:
        """The tensor with all updates of its layer, as `merged_weight` sums them.
        `read`: an original by key."""
        originals = [read(key) for key in self.keys]
        original = torch.cat(originals) if len(originals) > 1 else originals[0]
        if self.expert is not None:
            updates = (
                spec.single(adapter_weight, self.expert)
                for spec, adapter_weight in updates
            )
        return merged_weight(original, updates, self.entry.transposed, dtype)[self.rows]


def stored_weights(
    entry: LayerEntry,
    key: str,
    base: BaseCheckpoint,
) -> dict[str, StoredWeight]:
    """Key -> tensor, for all tensors of the layer's weight, the base's `key`."""
    if not is_stack(key):
        return {key: StoredWeight(entry, (key,), slice(None))}
    weights = {}
    for expert, keys in enumerate(base.members(key)):
        start = 0
        for member_key in keys:
            stop = start + base.shape_dtype(member_key)[0][0]
            rows = slice(start, stop)
            weights[member_key] = StoredWeight(entry, tuple(keys), rows, expert)
            start = stop
    return weights


def weight_shape(entry: LayerEntry) -> Shape:
    """The shape that the layer's weight has in the base: (d_out, d_in), reversed where
    it is stored transposed, and the number of experts before it."""
    *experts, d_out, d_in = entry.operator.weight_shape
    sides = (d_in, d_out) if entry.transposed else (d_out, d_in)
    return (*experts, *sides)
