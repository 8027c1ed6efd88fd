"""What crosses the network, counted where DeepSpeed sends it: the proof that no byte of the base does.

Wraps an internal of DeepSpeed 0.19.8, the backend object of deepspeed/comm/comm.py;
`tests/engine/test_zero_contract.py` fails loudly when an upgrade moves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from torch import Tensor


class CollectiveCounter:
    """Bytes that collectives carried through `deepspeed.comm` since the last `reset`, by kind.

    A call counts its largest tensor: the whole output of a gather, the whole input of a reduction.
    DeepSpeed's own comms logger synchronises the device for every call; this one only adds sizes up.
    """

    _GATHERS = ("all_gather_into_tensor", "all_gather_base", "all_gather", "all_gather_coalesced")
    _OTHERS = (
        "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
        "all_to_all_single", "all_to_all", "gather", "scatter", "send", "isend",
    )  # fmt: skip

    def __init__(self, base: Iterable[Tensor] = ()) -> None:
        """`base`: the frozen tensors; a collective that is handed memory of one of them counts into `base_bytes`."""
        self.bytes: Counter[str] = Counter()
        self.calls = 0
        """Gathers."""
        self.base_bytes = 0
        self._base_storages = {tensor.untyped_storage().data_ptr() for tensor in base}

    def reset(self) -> None:
        self.bytes.clear()
        self.calls = 0

    @property
    def gathered_bytes(self) -> int:
        return sum(self.bytes[kind] for kind in self._GATHERS)

    @contextmanager
    def counting(self) -> Iterator[CollectiveCounter]:
        """Count while the block runs. Wraps the methods of deepspeed/comm/comm.py's `cdb` backend object."""
        backend = deepspeed.comm.comm.cdb
        kinds = [kind for kind in (*self._GATHERS, *self._OTHERS) if hasattr(backend, kind)]
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
            self.bytes[kind] += max(nbytes_of(value) for value in values)
            self.calls += kind in self._GATHERS
            self.base_bytes += sum(nbytes_of(tensor) for tensor in tensors_of(values) if self._is_base(tensor))
            return call(*args, **kwargs)

        return counted

    def _is_base(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._base_storages


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Of what a collective is given."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def nbytes_of(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))
