"""torch's flash attention over all documents, as it is called on CUDA: by a stand-in for
it, and on a GPU.
"""

import pytest
import torch
from torch.testing import assert_close

from mora_ds.data.documents import Documents
from mora_ds.models import attention as module_under_test
from mora_ds.models.attention import document_attention
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


def as_varlen(q, k, v, bounds, left, scale):
    """(N, H, N) scores under the mask of causal documents with `left` keys before a query's
    own, and values (H, N, D) with their heads repeated: what torch's kernels compute
    with."""
    groups = q.shape[1] // k.shape[1]
    index = torch.arange(len(q))
    document = torch.bucketize(index, bounds[1:], right=True)
    distance = index[:, None] - index
    seen = (
        (document[:, None] == document)
        & (distance >= 0)
        & (distance <= (left if left >= 0 else len(q)))
    )
    keys, values = (
        tensor.repeat_interleave(groups, 1).transpose(0, 1) for tensor in (k, v)
    )
    return (q.transpose(0, 1) @ keys.mT * scale).masked_fill(
        ~seen, float("-inf")
    ), values


def forward_stand_in(q, k, v, *lengths, return_debug_mask, **options):
    assert return_debug_mask is False
    scores, values = as_varlen(q, k, v, *options_of(q, k, v, lengths, options))
    out = (scores.softmax(-1) @ values).transpose(0, 1)
    nothing = torch.empty(0)
    # No state of dropout, as there is none
    return out, scores.logsumexp(-1), None, None, nothing


def options_of(q, k, v, lengths, options):
    """The documents' bounds, the keys that a query sees and the scale, all as torch's flash
    attention wants them.
    """
    begins, ends, longest, most, dropout, is_causal = lengths
    assert begins is ends
    assert longest == most == int(begins.diff().max())
    assert len(q) == int(begins[-1])
    assert q.shape[2] == k.shape[2] == v.shape[2]
    assert q.shape[2] % 8 == 0
    left = options.pop("window_size_left")
    scale = options.pop("scale")
    assert options == {"window_size_right": 0}
    assert dropout == 0
    assert is_causal is (left < 0)
    return begins, left, scale


@pairwise({"layout": list(LAYOUTS), "window": [None, 12, 40]})
def test_varlen_is_called_for_dense_attention(layout, window, monkeypatch):
    """A stand-in takes the place of torch's kernel, which needs a GPU."""
    monkeypatch.setattr(module_under_test, "fits_varlen", lambda *arguments: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward_stand_in)
    positions = positions_of(LAYOUTS[layout])
    for shared, value_size in ((HEADS, SIZE), (2, 12), (1, 20)):
        inputs = parts(len(positions), LENGTH, shared, value_size)[:3]
        documents = Documents.of(positions)
        options = {"sliding_window": window, "documents": documents}
        output, _ = document_attention(torch.nn.Module(), *inputs, None, **options)
        assert documents.windows == {window}
        expected = reference(*inputs, positions, SIZE**-0.5, window, None, None)
        assert_same_attention(output, expected, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 12])
def test_varlen_is_dense_attention(layout, window):
    positions = positions_of(LAYOUTS[layout])
    documents = Documents.of(positions).to("cuda")
    inputs = parts(len(positions), LENGTH, 2)[:3]
    half = [
        tensor.detach().to("cuda", torch.bfloat16).requires_grad_() for tensor in inputs
    ]
    output, _ = document_attention(
        torch.nn.Module(), *half, None, sliding_window=window, documents=documents
    )
    expected = reference(*inputs, positions, SIZE**-0.5, window, None, None)
    assert_close(output.double().cpu(), expected, rtol=2e-2, atol=2e-2)
    for one, wanted in zip(
        gradients(output.double().cpu(), half), gradients(expected, inputs), strict=True
    ):
        assert_close(
            one.double().cpu(), wanted, rtol=5e-2, atol=5e-2 * float(wanted.abs().max())
        )
