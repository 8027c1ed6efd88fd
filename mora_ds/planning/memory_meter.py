"""The bytes that torch code allocates, counted by storages, on real or on meta tensors.

    with MemoryMeter(known=model tensors) as meter: ...      meter.live, meter.peak in bytes

On the meta device a forward and backward pass of a model of any size takes seconds and
no memory, and allocates the same storages as on any device. Two things are replaced
there: attention, which would fall back to complete score matrices (`fused_attention`),
and branches that depend on data (`MemoryMeter.answer`).
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mora_ds.common.attributes import replaced
from mora_ds.common.errors import UserError


class MemoryMeter(TorchDispatchMode):
    """Bytes of the storages that operators create while it is entered, until each is
    freed.

    `known`: tensors that existed before, which are not counted. Inputs of operators
    that were not created within count as known too, so that in-place operators need no
    list of them.
    """

    def __init__(self, known: Iterable[Tensor] = (), answer: bool = False) -> None:
        """`answer`: the value of a boolean meta tensor where the code branches on
        it."""
        super().__init__()
        self.live = self.peak = 0
        self.answer = answer
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()
        for tensor in known:
            self._know(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            if args[0].dtype is torch.bool:
                return self.answer
            raise UserError(
                "what this model computes depends on its data in a way that no plan can know (a mixture of experts?): "
                "plan a model of the same shape without it"
            )
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._know(tensor.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _know(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known and key not in self._sizes:
            self._known.add(key)
            # Once it is freed, another storage may get its address.
            weakref.finalize(storage, self._known.discard, key)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within it, attention on meta tensors allocates what the fused kernels of real
    devices do: they save queries, keys, values, the output and one number a query; a
    boolean mask is first cast to the queries' dtype, in every layer.

    The function is patched, as a mode would not reach what gradient checkpointing
    recomputes.
    """
    sdpa = F.scaled_dot_product_attention

    def fused(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attend = _attend if query.is_meta else sdpa
        return attend(query, *args, **kwargs)

    with replaced(F, "scaled_dot_product_attention", fused):
        yield


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of queries (B, H, T, D), which allocates as a fused kernel does."""
    if attn_mask is not None:
        attn_mask = query.new_empty(query.shape[0], 1, query.shape[2], query.shape[2])
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, False, attn_mask=attn_mask, scale=scale
    )
    return out
