"""The part of a MoRA operator that one rank of a tensor-parallel group computes.

A window is a range of a layer's inputs and a range of its outputs. It computes the
contribution of its inputs to its outputs in the update y = decompress(M compress(x)).
Windows over all output ranges, concatenated, give the full update (a colwise layer), and
so do windows over all input ranges, summed (a rowwise layer).

A window's maps are those of the operator (`index_tables`) without the inputs and outputs
of other windows. So the functions of `adapters.ops.mora` work for a window as for an
operator.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mora_ds.adapters.ops.index_tables import (
    IndexMap,
    IndexTables,
    lists,
    make_tables,
    transposed,
)
from mora_ds.adapters.ops.mora import OperatorSpec

Range = tuple[int, int]
"""[start, stop)."""


@dataclass(frozen=True)
class Window:
    """A range of inputs and a range of outputs of an operator."""

    spec: OperatorSpec
    inputs: Range
    outputs: Range

    @property
    def d_in(self) -> int:
        return self.inputs[1] - self.inputs[0]

    @property
    def d_out(self) -> int:
        return self.outputs[1] - self.outputs[0]

    @property
    def r_hat(self) -> int:
        return self.spec.r_hat

    @property
    def blocks(self) -> int:
        return self.spec.blocks

    @property
    def rotates(self) -> bool:
        return self.spec.rotates

    def tables(self, device: torch.device) -> IndexTables:
        return tables_of_window(self, device)


@lru_cache(maxsize=1024)
def tables_of_window(window: Window, device: torch.device) -> IndexTables:
    """The maps on a device, with only the terms of the window."""
    with torch.inference_mode(False), torch.no_grad():
        tables = make_tables(window.spec, torch.device("cpu"))
        fold = _within(tables.fold.table, window.inputs)
        return IndexTables(
            fold=IndexMap.of(fold, device),
            unfold=IndexMap.of(transposed(fold, window.d_in), device),
            spread=IndexMap.of(tables.spread.table[:, slice(*window.outputs)], device),
            collect=IndexMap.of(_within(tables.collect.table, window.outputs), device),
            r_hat=window.r_hat,
            overlap=tables.overlap,
        )


def _within(table: Tensor, numbers: Range) -> Tensor:
    """(K, Q) -> (K', Q): the terms in a range, relative to its start."""
    start, stop = numbers
    inside = (table >= start) & (table < stop)
    results = torch.arange(table.shape[1]).expand_as(table)
    return lists(results[inside], table[inside].long() - start, table.shape[1])
