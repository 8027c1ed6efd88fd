"""Attention from complete scores, and the queries, keys and documents that it is compared
on.
"""

import torch
from torch.testing import assert_close

from tests.helpers.tables import parsed

LENGTH = 96
HEADS = 4
SIZE = 16
LAYOUTS = parsed("""
whole rows: [[96], [96]]
two documents: [[40, 56], [96]]
many documents: [[5, 17, 1, 1, 17, 30, 2, 23], [19, 3, 3, 3, 40, 28]]
equal documents: [[24, 24, 24, 24], [24, 24, 24, 24]]
""")
"""Lengths of the documents in each of two rows."""


def positions_of(layout):
    """(B, T) positions of documents with these lengths in each row."""
    return torch.stack(
        [torch.cat([torch.arange(length) for length in row]) for row in layout]
    )


def parts(rows, length, shared, value_size=SIZE, dtype=torch.float64):
    """Query, key, value and sinks that need gradients; scores of about 3."""
    generator = torch.Generator().manual_seed(rows + length + shared)
    shapes = [
        (rows, HEADS, length, SIZE),
        (rows, shared, length, SIZE),
        (rows, shared, length, value_size),
        (HEADS,),
    ]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).mul(1.7).requires_grad_()
        for shape in shapes
    ]


def reference(
    query,
    key,
    value,
    positions,
    scale,
    window,
    softcap,
    sinks,
):
    """(B, T, H, D_v), from complete scores."""
    groups = query.shape[1] // key.shape[1]
    length = query.shape[2]
    scores = query @ key.repeat_interleave(groups, 1).mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    document = torch.nn.functional.pad((positions.diff(dim=1) != 1).cumsum(1), (1, 0))
    index = torch.arange(length, device=query.device)
    distance = index[:, None] - index
    seen = (
        (document[:, None, :, None] == document[:, None, None])
        & (distance >= 0)
        & (distance < (window or length))
    )
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1
        )
    return (
        scores.softmax(-1)[..., :length] @ value.repeat_interleave(groups, 1)
    ).transpose(1, 2)


def gradients(out, inputs):
    """Gradients of a fixed random sum of the output."""
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype
    )
    return list(torch.autograd.grad((out * weights).sum(), inputs))


def assert_same_attention(output, expected, inputs):
    """Compares outputs in fp64, and their gradients with respect to `inputs`."""
    assert_close(output, expected, rtol=1e-6, atol=1e-6)
    for one, another in zip(
        gradients(output, inputs), gradients(expected, inputs), strict=True
    ):
        assert_close(one, another, rtol=1e-5, atol=1e-5)
