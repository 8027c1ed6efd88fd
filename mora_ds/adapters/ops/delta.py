"""Updates added to a weight without forming their deltas: most of the time of a merge,
a resume and an export.

    share, truncate      rows of the weight += the rows of `tables.unfold(M)` that they read; 1 MiB of the weight at a
                         time
    decouple, rotate     only where a block of inputs meets a block of outputs, as the delta is zero elsewhere

Every sum adds the same two numbers as `total + spec.delta_weight(adapter_weight)`, so the bits
are the same. An update that is no delta changes the weight by `UpdateSpec.merge_into_`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mora_ds.adapters.ops.spec import Update


def merge_updates_(total: Tensor, updates: Iterable[Update]) -> None:
    """Merges each (spec, adapter_weight) into `total` in turn, in place: the merged weight of
    one update is the base of the next.

    `total`: contiguous (d_out, d_in), of a stack (E, d_out, d_in); the values are moved
    to its device and dtype.
    """
    if total.dim() > 2:
        for spec, adapter_weight in updates:
            for index, matrix in enumerate(total):
                merge_updates_(matrix, [spec.single(adapter_weight, index)])
        return
    for spec, adapter_weight in updates:
        spec.merge_into_(total, adapter_weight.to(total.device, total.dtype))


@torch.no_grad()
def merged_weight(
    original: Tensor,
    updates: Iterable[Update],
    transposed: bool,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Tensor:
    """The base weight with all `updates` merged, in fp32, rounded once.

    `original`: (d_out, d_in), or (d_in, d_out) when `transposed`, or a stack of such;
    it is not written to. The result has its layout, lies on `device` (by default that
    of `original`) and shares no memory with it. Elementwise operations only, so that
    every number of threads gives the same bits.
    """
    device = torch.device(device) if device is not None else original.device
    original = original.mT if transposed else original
    total = torch.empty(original.shape, dtype=torch.float32, device=device)
    # Moved before it is cast: in one call the CPU would cast, and send twice the bytes
    # of bf16 to a GPU
    total.copy_(original.to(device))
    merge_updates_(total, updates)
    return (total.mT.contiguous() if transposed else total).to(dtype)
