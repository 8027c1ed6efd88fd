"""A frozen weight in 4 bits, by bitsandbytes (the extra `bits4`): NF4 of QLoRA (arXiv
2305.14314, section 3).

    quantize(W) -> packed, scales       in blocks of 64 numbers: the largest of them, and the nearest of 16 levels each
    NF4Weight(packed, scales, ...)      scale * level, and the terms of merged cycles

The weight is rounded once, from the base's files, and never again: what a merge adds
stays in its own matrices (`ops.updates`), as the rounding, a tenth of the weights' norm,
would swallow it. A dense sum of them in bf16 would take four times the memory of the 4
bits.

    product over activations     W4 x + the terms' updates of x
    dense                        W4 + the terms' deltas, summed in fp32 and rounded once, as a merge into a dense base
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from logging import ERROR, getLogger
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.frozen import Maker, QuantizedWeight
from mora_ds.adapters.ops.spec import AdditiveTerm
from mora_ds.adapters.ops.updates import add_terms_, add_terms_gradient_, merge_updates_
from mora_ds.common.errors import RunError, UserError

BLOCK = 64
"""Numbers with one scale: bitsandbytes' default, 4.5 bits a number in all."""

_TYPE = "nf4"

_WIDEST_GAP = 0.304
"""Between the levels -1 and -0.696, as a share of a block's largest number."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that bitsandbytes gives."""


def check_installed() -> None:
    """Raises `UserError` that names the extra where bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "`base_bits` 4 needs the package bitsandbytes: pip install 'mora_ds[bits4]'"
        )


@dataclass(frozen=True)
class NF4Weight(QuantizedWeight):
    """`packed` and `scales` of `quantize`, of a weight (O, D), and `terms` to add."""

    bits: ClassVar[int] = 4
    shape: tuple[int, ...]
    terms: tuple[AdditiveTerm, ...] = ()

    def dense(self, dtype: torch.dtype) -> Tensor:
        if not self.terms:
            return self._original(dtype)
        total = self._original(torch.float32)
        merge_updates_(total, self.terms)
        return total.to(dtype)

    @property
    def largest_error(self) -> float:
        return self.scales.max().item() * _WIDEST_GAP / 2

    @property
    def maker(self) -> Maker:
        return partial(NF4Weight, shape=self.shape, terms=self.terms)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, self._original(x.dtype), bias)
        return add_terms_(y, self.terms, x)

    def input_gradient(self, g: Tensor) -> Tensor:
        return add_terms_gradient_(g @ self._original(g.dtype), self.terms, g)

    def _original(self, dtype: torch.dtype) -> Tensor:
        """(O, D) without the terms."""
        if self.values.is_meta:
            return torch.empty(self.shape, dtype=dtype, device="meta")
        known = dtype if dtype in _DTYPES else torch.float32
        library = _library()
        row = torch.Size((1, 2 * len(self.values)))
        state = library.QuantState(
            absmax=self.scales,
            shape=row,
            dtype=known,
            blocksize=BLOCK,
            quant_type=_TYPE,
        )
        numbers: Tensor = library.dequantize_4bit(self.values, state).reshape(-1)
        return numbers[: self.shape[0] * self.shape[1]].view(self.shape).to(dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, D) of any floating dtype -> packed uint8 (numbers / 2, 1), two in each byte,
    and scales fp32 (blocks,).

    Raises `RunError` where an element is not finite, and `UserError` where bitsandbytes
    is missing.
    """
    if weight.is_meta:
        # The weight of a plan has sizes alone
        numel = weight.numel()
        packed = torch.empty(-(-numel // 2), 1, dtype=torch.uint8, device="meta")
        return packed, torch.empty(
            -(-numel // BLOCK), dtype=torch.float32, device="meta"
        )
    if not torch.isfinite(weight).all():
        raise RunError("a weight that is not finite cannot be held in 4 bits")
    numbers = weight.float().flatten()
    numbers = F.pad(numbers, (0, numbers.numel() % 2))
    packed, state = _library().quantize_4bit(numbers, blocksize=BLOCK, quant_type=_TYPE)
    return packed, state.absmax


@cache
def _library() -> Any:
    """bitsandbytes.functional."""
    check_installed()
    with _quiet_and_offline():
        from bitsandbytes import functional

    return functional


@contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """While bitsandbytes is imported: backends/cpu/ops.py would load a kernel from the
    Hub, code that nobody asked for, where the package `kernels` is installed, and warns
    where it is not."""
    name = "kernels"
    logger = getLogger("bitsandbytes.backends.cpu.ops")
    before = sys.modules.get(name)
    level = logger.level
    sys.modules[name] = None  # type: ignore[assignment]
    logger.setLevel(ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
