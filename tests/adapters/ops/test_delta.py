"""Deltas added in place: the bits of `total + delta_weight`, for every operator and
shape.
"""

import itertools

import pytest
import torch

from mora_ds.adapters.ops import mora
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.adapters.ops.updates import merge_updates_
from mora_ds.common.errors import UserError
from tests.helpers.adapters import summed
from tests.helpers.operators import random

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


def assert_same_bits(total, updates):
    """Deltas added in place are those that are formed one after the other."""
    expected = summed(total, updates, False, torch.float32)
    merge_updates_(total, iter(updates))
    assert torch.equal(total, expected), updates


@pytest.mark.parametrize("kind", OperatorKind)
def test_the_same_bits_as_forming_the_delta(kind):
    checked = specs(kind)
    assert len(checked) >= 90
    for spec in checked:
        mora_matrix = random(*spec.adapter_weight_shape).float()
        assert_same_bits(
            random(spec.d_out, spec.d_in, seed=1).float(), [(spec, mora_matrix)]
        )


def test_many_cycles_of_many_kinds_keep_their_order(monkeypatch):
    """The weight may be processed in parts."""
    monkeypatch.setattr(mora, "_CHUNK", 100)
    kinds = ["share", "rotate", "share", "truncate", "share"] * 3
    chain = [
        OperatorSpec(OperatorKind(kind), 40, 30, 12, Grouping.PERMUTED, seed)
        for seed, kind in enumerate(kinds)
    ]
    chain.insert(4, LoRASpec(40, 30, 3, 6.0))
    updates = [
        (spec, random(*spec.adapter_weight_shape, seed=index).float())
        for index, spec in enumerate(chain)
    ]
    assert_same_bits(random(30, 40, seed=99).float(), updates)
