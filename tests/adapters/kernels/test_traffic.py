"""The count of bytes that kernels move: what it holds them to, and that it sees rows that
are read twice.
"""

import numpy as np
import pytest
import torch

from mora_ds.adapters.ops.spec import OperatorKind
from tests.helpers import traffic

MOST = 1.15
"""Bytes of a step of a layer, by the least that it can do with."""

MOST_BY_ARITHMETIC = 1.95
"""The same for M's gradient at a side of 3,072: its 576 tiles are more than an H100
sums at once, so operands are read again."""

FLOPS = 620e12
BYTES = 2.8e12
"""A second, of an H100."""


@pytest.mark.parametrize("tokens", traffic.TOKENS)
@pytest.mark.parametrize(("kind", "rank"), traffic.OPERATORS)
def test_each_step_moves_hardly_more_than_the_least(kind, rank, tokens):
    for shape in traffic.SHAPES:
        spec = traffic.layer_spec(kind, rank, shape)
        for step, (actual, least) in traffic.step_bytes(spec, tokens).items():
            by_arithmetic = step == "dM" and spec.r_hat == 3072
            assert (
                least
                <= actual
                <= (MOST_BY_ARITHMETIC if by_arithmetic else MOST) * least
            ), (shape, step)
            if by_arithmetic:  # the product takes longer than its reads
                assert 3 * actual / BYTES < 2 * tokens * spec.r_hat**2 / FLOPS, (
                    "the product takes longer than its reads"
                )


def test_rows_read_again_by_distant_programs_count_again(monkeypatch):
    spec = traffic.layer_spec(OperatorKind.ROTATE, 8, (28672, 8192))
    fold = traffic.launches(spec, torch.bfloat16, tokens=16384)["fold"]
    least = sum(tensor.nbytes for tensor in traffic.operands(fold).values())
    by_neighbors = traffic.parts_read(fold)
    (programs,) = fold.grid
    by_distant = {**by_neighbors, "x": np.arange(programs) % (16384 // 4)}
    monkeypatch.setattr(traffic, "parts_read", lambda launch: by_distant)
    assert traffic.launch_bytes(fold) > 5 * least
