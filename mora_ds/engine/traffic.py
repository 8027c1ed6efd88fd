"""Counts the bytes of DeepSpeed's collectives, to prove that none is of the base.

Wraps an internal of DeepSpeed 0.19.8, the backend object of deepspeed/comm/comm.py;
tests/engine/test_zero.py, which also counts below DeepSpeed, fails when an upgrade
moves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from torch import Tensor
from torch.utils._pytree import tree_leaves


class CollectiveCounter:
    """Counts the bytes of collectives through `deepspeed.comm`, by type.

    A call counts as its largest tensor: the output of a gather, the input of a
    reduction. In contrast to DeepSpeed's comms logger it does not synchronize the
    device.
    """

    _KINDS = (
        "all_gather", "all_gather_base", "all_gather_coalesced", "all_gather_into_tensor", "all_reduce",
        "all_reduce_coalesced", "all_to_all", "all_to_all_single", "broadcast", "gather", "isend", "reduce",
        "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
    )  # fmt: skip

    def __init__(self, base: Iterable[Tensor] = ()) -> None:
        """`base`: the frozen tensors. Collectives on their memory also count in
        `base_bytes`."""
        self.bytes: Counter[str] = Counter()
        self.base_bytes = 0
        self._base_storages = {tensor.untyped_storage().data_ptr() for tensor in base}

    def reset(self) -> None:
        self.bytes.clear()

    @property
    def gathered_bytes(self) -> int:
        return sum(size for kind, size in self.bytes.items() if "all_gather" in kind)

    @contextmanager
    def counting(self) -> Iterator[CollectiveCounter]:
        """A context that counts, by wrapping `cdb`, the backend of
        deepspeed/comm/comm.py."""
        backend = deepspeed.comm.comm.cdb
        kinds = [kind for kind in self._KINDS if hasattr(backend, kind)]
        for kind in kinds:
            setattr(backend, kind, self._counted(kind, getattr(backend, kind)))
        try:
            yield self
        finally:
            for kind in kinds:
                delattr(backend, kind)

    def _counted(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            self.bytes[kind] += max(map(nbytes_of, values))
            for tensor in tensors_of(values):
                if tensor.untyped_storage().data_ptr() in self._base_storages:
                    self.base_bytes += nbytes_of(tensor)
            return call(*args, **kwargs)

        return counted


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors among a collective's arguments."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def nbytes_of(value: Any) -> int:
    """Bytes of the tensors among a collective's arguments."""
    return sum(tensor.nbytes for tensor in tensors_of(value))
