"""Deltas added in place: the bits of `total + delta_weight`, for every operator and
shape.
"""

import itertools

import pytest
import torch

from mora_ds.adapters.ops import mora
from mora_ds.adapters.ops.delta import add_deltas_
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.common.errors import UserError

SHAPES = [
    (16, 16),
    (16, 24),
    (24, 16),
    (33, 50),
    (50, 33),
    (7, 64),
    (64, 7),
    (96, 20),
    (20, 96),
]
SIDES = (2, 6, 10, 16, 30, 70)


def specs(kind):
    """Every one that exists: sides below, at and above the layer's, that divide it and do
    not.
    """
    valid = []
    for (d_in, d_out), side, grouping in itertools.product(SHAPES, SIDES, Grouping):
        try:
            valid.append(OperatorSpec(kind, d_in, d_out, side, grouping, 3))
        except UserError:
            continue
    return valid


def one_by_one(total, updates):
    for spec, value in updates:
        total = total + spec.delta_weight(value)
    return total


@pytest.mark.parametrize("kind", OperatorKind)
def test_the_same_bits_as_forming_the_delta(kind):
    generator = torch.Generator().manual_seed(0)
    checked = specs(kind)
    assert len(checked) >= 90
    for spec in checked:
        square = torch.randn(spec.r_hat, spec.r_hat, generator=generator)
        total = torch.randn(spec.d_out, spec.d_in, generator=generator)
        expected = one_by_one(total, [(spec, square)])
        add_deltas_(total, [(spec, square)])
        assert torch.equal(total, expected), spec


def test_many_cycles_of_many_kinds_keep_their_order(monkeypatch):
    """Also where the weight is processed in parts."""
    monkeypatch.setattr(mora, "_CHUNK", 100)
    generator = torch.Generator().manual_seed(1)
    kinds = [
        OperatorKind.SHARE,
        OperatorKind.ROTATE,
        OperatorKind.SHARE,
        OperatorKind.TRUNCATE,
        OperatorKind.SHARE,
    ]
    chain = [
        OperatorSpec(kind, 40, 30, 12, Grouping.PERMUTED, seed)
        for seed, kind in enumerate(kinds * 3)
    ]
    chain.insert(4, LoRASpec(40, 30, 3, 6.0))
    updates = [(spec, torch.randn(spec.value_shape, generator=generator)) for spec in chain]
    total = torch.randn(30, 40, generator=generator)
    expected = one_by_one(total, updates)
    add_deltas_(total, iter(updates))
    assert torch.equal(total, expected)
