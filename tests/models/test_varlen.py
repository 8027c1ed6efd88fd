"""torch's flash attention over all documents, as it is called on CUDA: on the meta device, and by stand-ins for it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mora_ds.data.documents import Documents
from mora_ds.models import document_attention as module_under_test
from mora_ds.models.document_attention import document_attention
from mora_ds.models.sink_attention import VarlenKernel
from tests.helpers.attention import (
    HEADS,
    LAYOUTS,
    LENGTH,
    SIZE,
    assert_same_attention,
    gradients,
    parts,
    positions_of,
    reference,
)
from tests.helpers.pairwise import pairwise


def test_varlen_keeps_its_contract():
    """The meta device runs the registered shapes of forward and backward, which take the arguments of torch's own."""
    bounds = torch.tensor([0, 3, 10], dtype=torch.int32, device="meta")
    query, key, value = (torch.empty(10, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    kernel = VarlenKernel(bounds, 7, 5, 0.5)
    out, sums = kernel.forward(query, key, value)
    assert out.shape == (10, 4, 16)
    assert sums.shape == (4, 10)
    assert sums.dtype is torch.float32
    input_gradients = kernel.backward(out, query, key, value, out, sums)
    assert [gradient.shape for gradient in input_gradients] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("size, value_size", [(16, 16), (20, 12), (192, 128)])
@pytest.mark.parametrize("sinks", [False, True])
def test_head_sizes_are_padded_for_the_kernel(size: int, value_size: int, sinks: bool):
    shapes = ((2, 4, 32, size), (2, 2, 32, size), (2, 2, 32, value_size))
    query, key, value = (torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes)
    sink_logits = torch.empty(4, device="meta") if sinks else None
    out, _ = document_attention(torch.nn.Module(), query, key, value, None, s_aux=sink_logits)
    out.sum().backward()
    assert out.shape == (2, 32, 4, value_size)
    assert query.grad is not None
    assert query.grad.shape == query.shape


def as_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, left: int, scale: float) -> tuple[Tensor, Tensor]:
    """(N, H, N) scores under the mask of causal documents with `left` keys before a query's own, and values (H, N, D)
    with their heads repeated: what torch's kernels compute with."""
    groups = q.shape[1] // k.shape[1]
    index = torch.arange(len(q))
    document = torch.bucketize(index, bounds[1:], right=True)
    distance = index[:, None] - index
    seen = (document[:, None] == document) & (distance >= 0) & (distance <= (left if left >= 0 else len(q)))
    keys, values = (tensor.repeat_interleave(groups, 1).transpose(0, 1) for tensor in (k, v))
    return (q.transpose(0, 1) @ keys.mT * scale).masked_fill(~seen, float("-inf")), values


def forward_stand_in(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, return_debug_mask: bool, **told: Any) -> Any:
    assert return_debug_mask is False
    scores, values = as_varlen(q, k, v, *told_of(q, k, v, lengths, told))
    out = (scores.softmax(-1) @ values).transpose(0, 1)
    nothing = torch.empty(0)
    return out, scores.logsumexp(-1), None, None, nothing  # no state of dropout, as there is none


def told_of(q: Tensor, k: Tensor, v: Tensor, lengths: Any, told: dict[str, Any]) -> tuple[Tensor, int, float]:
    """The documents' bounds, the keys that a query sees and the scale, all as torch's flash attention wants them."""
    begins, ends, longest, most, dropout, is_causal = lengths
    assert begins is ends
    assert longest == most == int(begins.diff().max())
    assert len(q) == int(begins[-1])
    assert q.shape[2] == k.shape[2] == v.shape[2]
    assert q.shape[2] % 8 == 0
    left = told.pop("window_size_left")
    scale = told.pop("scale")
    assert told == {"window_size_right": 0}
    assert dropout == 0
    assert is_causal is (left < 0)
    return begins, left, scale


def backward_stand_in(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, *others: Any, **told: Any
) -> tuple[Tensor, ...]:
    """As flash attention's: weights from the sums of exponentials that are given, less g . out."""
    *lengths, seed, offset = others
    assert seed.tolist() == [0, 0]
    assert seed.dtype is torch.uint64
    assert not len(offset)
    assert sums.shape == (q.shape[1], len(q))
    assert out.shape == q.shape
    bounds, left, scale = told_of(q, k, v, lengths, told)
    groups = q.shape[1] // k.shape[1]
    scores, values = as_varlen(q, k, v, bounds, left, scale)
    weights = torch.exp(scores - sums[..., None])
    g = grad.transpose(0, 1)
    of_scores = weights * (g @ values.mT - (grad * out).sum(-1).T[..., None]) * scale
    of_query = of_scores @ k.repeat_interleave(groups, 1).transpose(0, 1)
    of_key = of_scores.mT @ q.transpose(0, 1)
    of_value = weights.mT @ g
    shared = (gradient.unflatten(0, (-1, groups)).sum(1).transpose(0, 1) for gradient in (of_key, of_value))
    return of_query.transpose(0, 1), *shared


@pairwise({"layout": list(LAYOUTS), "window": [None, 12, 40], "kind": ["plain", "sinks"]})
def test_varlen_is_called_for_dense_attention(
    layout: str, window: int | None, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """Stand-ins in place of torch's kernels, which need a GPU."""
    monkeypatch.setattr(module_under_test, "fits_varlen", lambda *arguments: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward_stand_in)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward_stand_in)
    positions = positions_of(LAYOUTS[layout])
    for shared, value_size in ((HEADS, SIZE), (2, 12), (1, 20)):
        query, key, value, sinks = parts(len(positions), LENGTH, shared, value_size)
        used_sinks, inputs = (sinks, [query, key, value, sinks]) if kind == "sinks" else (None, [query, key, value])
        documents = Documents.of(positions)
        output, _ = document_attention(
            torch.nn.Module(), query, key, value, None, sliding_window=window, s_aux=used_sinks, documents=documents
        )
        assert documents.windows == {window}
        expected = reference(query, key, value, positions, SIZE**-0.5, window, None, used_sinks)
        assert_same_attention(output, expected, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("kind", ["plain", "sinks"])
def test_varlen_is_dense_attention(layout: str, window: int | None, kind: str):
    positions = positions_of(LAYOUTS[layout])
    documents = Documents.of(positions).to("cuda")
    inputs = parts(len(positions), LENGTH, 2)
    half = [tensor.detach().to("cuda", torch.bfloat16).requires_grad_() for tensor in inputs]
    output, _ = document_attention(
        torch.nn.Module(), *half[:3], None, sliding_window=window, s_aux=half[3] if kind == "sinks" else None,
        documents=documents,
    )  # fmt: skip
    sinks = inputs[3] if kind == "sinks" else None
    expected = reference(*inputs[:3], positions, SIZE**-0.5, window, None, sinks)
    count = 4 if kind == "sinks" else 3
    assert_close(output.double().cpu(), expected, rtol=2e-2, atol=2e-2)
    for one, wanted in zip(
        gradients(output.double().cpu(), half[:count]), gradients(expected, inputs[:count]), strict=True
    ):
        assert_close(one.double().cpu(), wanted, rtol=5e-2, atol=5e-2 * float(wanted.abs().max()))
