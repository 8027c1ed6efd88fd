"""Attention by documents is dense attention under a mask, in its outputs and gradients, and holds nothing of T x T."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mora_ds.data.documents import Documents
from mora_ds.models import document_attention as module_under_test
from mora_ds.models.document_attention import document_attention, groups_of
from mora_ds.models.sink_attention import VarlenKernel

LENGTH, HEADS, SIZE = 96, 4, 16
LAYOUTS = {
    "whole rows": [[LENGTH], [LENGTH]],
    "two documents": [[40, 56], [LENGTH]],
    "many documents": [[5, 17, 1, 1, 17, 30, 2, 23], [19, 3, 3, 3, 40, 28]],
    "equal documents": [[24] * 4, [24] * 4],
}


def positions_of(layout: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in layout])


def parts(rows: int, length: int, shared: int, value_size: int = SIZE, dtype: torch.dtype = torch.float64) -> Any:
    """Query, key, value and sinks that need gradients; scores of about 3."""
    generator = torch.Generator().manual_seed(rows + length + shared)
    shapes = [(rows, HEADS, length, SIZE), (rows, shared, length, SIZE), (rows, shared, length, value_size), (HEADS,)]
    return [torch.randn(shape, generator=generator, dtype=dtype).mul(1.7).requires_grad_() for shape in shapes]


def reference(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float, window: int | None,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """(B, T, H, D_v), from complete scores."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    scores = query @ key.repeat_interleave(groups, 1).mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    document = torch.nn.functional.pad((positions.diff(dim=1) != 1).cumsum(1), (1, 0))
    index = torch.arange(length, device=query.device)
    distance = index[:, None] - index
    seen = (document[:, None, :, None] == document[:, None, None]) & (distance >= 0) & (distance < (window or length))
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., :length] @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 12, 40])
@pytest.mark.parametrize("kind", ["plain", "capped", "sinks"])
def test_it_is_dense_attention(layout: str, window: int | None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "QUERIES", 20)  # blocks that end within documents
    positions = positions_of(LAYOUTS[layout])
    for shared, value_size in ((HEADS, SIZE), (2, 8), (1, SIZE)):
        query, key, value, sinks = parts(len(positions), LENGTH, shared, value_size)
        softcap, given = 2.0 if kind == "capped" else None, sinks if kind == "sinks" else None
        inputs = [query, key, value] + ([sinks] if kind == "sinks" else [])
        for documents in (Documents.of(positions), None):
            out, _ = document_attention(
                torch.nn.Module(), query, key, value, None, scaling=0.3, softcap=softcap, sliding_window=window,
                s_aux=given, documents=documents, position_ids=positions,
            )  # fmt: skip
            expected = reference(query, key, value, positions, 0.3, window, softcap, given)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
            for found, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_window_of_blocks_is_dense_attention() -> None:
    """Documents longer than a block of queries under a window."""
    positions = torch.cat([torch.arange(500), torch.arange(140)])[None]
    query, key, value, sinks = parts(1, 640, 2)
    for window, given in product((30, 200), (None, sinks)):
        out, _ = document_attention(
            torch.nn.Module(), query, key, value, None, sliding_window=window, s_aux=given, position_ids=positions
        )
        expected = reference(query, key, value, positions, SIZE**-0.5, window, None, given)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        for found, wanted in zip(*(gradients(one, [query, key, value]) for one in (out, expected)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_groups_hold_every_token_once() -> None:
    lengths = (5, 17, 1, 1, 17, 30, 2, 700, 701, 24)
    groups = groups_of(lengths)
    assert groups.gather is not None and groups.scatter is not None
    total = sum(lengths)
    assert groups.gather[groups.scatter].tolist() == list(range(total))
    assert len(groups.gather) == sum(count * size for count, size in groups.shapes) < 1.25 * total
    assert len(groups.shapes) < len(lengths)
    for in_order in ((96,), (96, 96), (24,) * 8):
        assert groups_of(in_order).gather is None


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made while it is entered, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        sizes = [storage.nbytes() // 4 for storage in made]
        self.numbers = max([self.numbers, *sizes])
        return out


LONG = 4096


@pytest.mark.parametrize("lengths", [[LONG], [1000, 2500, 596], [64] * 64], ids=["one", "some", "many"])
@pytest.mark.parametrize("kind", ["plain", "window", "capped", "sinks"])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_no_tensor_has_t_times_t_numbers(lengths: list[int], kind: str, dtype: torch.dtype, device: str) -> None:
    """On the meta device bf16 takes the branch of a GPU."""
    documents = Documents.of(positions_of([lengths])).to(device)
    shapes = ((1, 2, LONG, 8), (1, 1, LONG, 8), (1, 1, LONG, 8), (2,))
    query, key, value, sinks = (torch.zeros(s, dtype=dtype, device=device, requires_grad=True) for s in shapes)
    with Largest() as largest:
        out, _ = document_attention(
            torch.nn.Module(), query, key, value, None, documents=documents,
            sliding_window=128 if kind == "window" else None, softcap=50.0 if kind == "capped" else None,
            s_aux=sinks if kind == "sinks" else None,
        )  # fmt: skip
        out.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape
    assert LONG * 8 <= largest.numbers < LONG * LONG / 2


def test_the_meter_notices_complete_scores() -> None:
    positions = positions_of([[LONG]])
    query = torch.empty(1, 1, LONG, 1, device="meta")
    with Largest() as largest:
        reference(query, query, query, positions.to("meta"), 1.0, None, None, None)
    assert largest.numbers >= LONG * LONG


# -- torch's varlen kernels, as they are called on CUDA ----------------------------------------------------------------


def test_varlen_keeps_its_contract() -> None:
    """The meta device runs the registered shapes of forward and backward, which take the arguments of torch's own."""
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32, device="meta")
    query, key, value = (torch.empty(10, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    kernel = VarlenKernel(bounds, 7, 5, 0.5)
    out, sums, *state = kernel.forward(query, key, value)
    assert out.shape == (10, 4, 16) and sums.shape == (4, 10) and sums.dtype is torch.float32
    found = kernel.backward(out, query, key, value, out, sums, *state)
    assert [part.shape for part in found] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize(("size", "value_size"), [(16, 16), (20, 12), (192, 128)])
@pytest.mark.parametrize("sinks", [False, True])
def test_head_sizes_are_padded_for_the_kernel(size: int, value_size: int, sinks: bool) -> None:
    shapes = ((2, 4, 32, size), (2, 2, 32, size), (2, 2, 32, value_size))
    query, key, value = (torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes)
    given = torch.empty(4, device="meta") if sinks else None
    out, _ = document_attention(torch.nn.Module(), query, key, value, None, s_aux=given)
    out.sum().backward()
    assert out.shape == (2, 32, 4, value_size) and query.grad is not None and query.grad.shape == query.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("kind", ["plain", "sinks"])
def test_varlen_is_dense_attention(layout: str, window: int | None, kind: str) -> None:
    positions = positions_of(LAYOUTS[layout])
    documents = Documents.of(positions).to("cuda")
    inputs = parts(len(positions), LENGTH, 2)
    half = [part.detach().to("cuda", torch.bfloat16).requires_grad_() for part in inputs]
    found, _ = document_attention(
        torch.nn.Module(), *half[:3], None, sliding_window=window, s_aux=half[3] if kind == "sinks" else None,
        documents=documents,
    )  # fmt: skip
    sinks = inputs[3] if kind == "sinks" else None
    expected = reference(*inputs[:3], positions, SIZE**-0.5, window, None, sinks)
    count = 4 if kind == "sinks" else 3
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-2, atol=2e-2)
    for one, other in zip(
        gradients(found.double().cpu(), half[:count]), gradients(expected, inputs[:count]), strict=True
    ):
        torch.testing.assert_close(one.double().cpu(), other, rtol=5e-2, atol=5e-2 * float(other.abs().max()))


# -- what it does not compute ------------------------------------------------------------------------------------------


def test_attention_of_another_kind_is_refused() -> None:
    query, key, value, _ = parts(1, 8, 2)
    both = torch.nn.Module()
    both.is_causal = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match="--attention dense"):
        document_attention(both, query, key, value, None)
    with pytest.raises(ValueError, match="--attention dense"):
        document_attention(torch.nn.Module(), query, key, value, None, position_bias=query)
    with pytest.raises(ValueError, match="documents of 9 tokens came with 1 rows of 8"):
        document_attention(torch.nn.Module(), query, key, value, None, documents=Documents.whole_rows(1, 9))
