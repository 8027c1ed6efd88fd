"""Several updates at once: merged into a weight without forming their deltas, or added to
what a layer computes.

Merging is most of the time of a merge, a resume and an export.

    share, truncate      rows of the weight += the rows of `tables.unfold(M)` that they read; 1 MiB of the weight at a
                         time
    decouple, rotate     only where a block of inputs meets a block of outputs, as the delta is zero elsewhere

Every sum adds the same two numbers as `total + spec.delta_weight(adapter_weight)`, so the bits
are the same. An update that is no delta changes the weight by `UpdateSpec.merge_into_`.

A weight in 4 bits does not take up the updates of merged cycles, which go on acting
through their adapter weights, each an `AdditiveTerm`:

    W x = W0 x + sum over the terms of update(x)

Over activations a term costs what the current cycle's matrix costs, without that one's
gradient; over the weight (`merge_updates_`) a pass over W.

Shape legend:  O = d_out, D = d_in.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mora_ds.adapters.ops.spec import AdditiveSpec, AdditiveTerm, Update, additive


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


def join(updates: Iterable[Update]) -> tuple[AdditiveTerm, ...]:
    """The fewest terms with the same sum, in fp32 (`AdditiveSpec.joined`)."""
    adapter_weights: dict[AdditiveSpec, list[Tensor]] = {}
    for spec, adapter_weight in updates:
        adapter_weights.setdefault(additive(spec), []).append(adapter_weight.float())
    return tuple(spec.joined(of_spec) for spec, of_spec in adapter_weights.items())


def add_terms_(y: Tensor, terms: Iterable[AdditiveTerm], x: Tensor) -> Tensor:
    """y (..., O) + the updates of x (..., D), in place. Without a backward."""
    for spec, adapter_weight in terms:
        spec.add_update_(y, adapter_weight.to(x.dtype), x)
    return y


def add_terms_gradient_(
    g_x: Tensor, terms: Iterable[AdditiveTerm], g: Tensor
) -> Tensor:
    """g_x (..., D) + the transpose of `add_terms_` of g (..., O), in place."""
    for spec, adapter_weight in terms:
        spec.add_input_gradient_(g_x, adapter_weight.to(g.dtype), g)
    return g_x
