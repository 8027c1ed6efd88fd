"""`MoRALinear` is the layer that it replaces at M = 0, and base + delta at any other M."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.layer import MoRALinear, is_linear, linear_shape
from mora_ds.adapters.ops import index_tables
from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from tests.helpers.operators import specs_of_tables
from tests.helpers.pairwise import pairwise

D_IN = 14
D_OUT = 10
R_HAT = 6


def base_layer(kind):
    torch.manual_seed(0)
    if kind == "conv1d":
        conv = Conv1D(D_OUT, D_IN)
        nn.init.normal_(conv.bias)
        return conv
    return nn.Linear(D_IN, D_OUT, bias=kind == "linear with bias")


def spec(kind=OperatorKind.ROTATE):
    return OperatorSpec(kind, D_IN, D_OUT, R_HAT, Grouping.PERMUTED, seed=1)


def inputs(seed=1):
    return torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(seed))


BASES = ["linear", "linear with bias", "conv1d"]


@pairwise({"kind": BASES, "operator": list(OperatorKind)})
def test_output_is_base_plus_delta_merged_or_not(kind, operator):
    base = base_layer(kind)
    x = inputs()
    expected = base(x)
    layer = MoRALinear(base, spec(operator))
    assert torch.equal(layer.mora_matrix, torch.zeros(R_HAT, R_HAT))
    assert_close(layer(x), expected, rtol=0, atol=1e-6)
    layer.mora_matrix.data.normal_()
    delta = delta_weight(layer.spec, layer.mora_matrix.data)
    expected = expected + x @ delta.T
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.weight += delta.T if layer.transposed else delta
    layer.mora_matrix.data.zero_()
    assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_dropout_applies_to_the_input_of_m_and_only_in_training():
    base = base_layer("linear")
    x = inputs()
    base_output = base(x).detach()
    layer = MoRALinear(base, spec(), dropout=0.5)
    assert_close(layer(x), base_output, rtol=0, atol=1e-6)  # the base sees all of x
    layer.mora_matrix.data.normal_()
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    plain = MoRALinear(base_layer("linear"), layer.spec)
    plain.mora_matrix.data = layer.mora_matrix.data
    assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    update = torch.stack([layer(x).detach() - base_output for _ in range(4000)]).mean(
        dim=0
    )
    # Dropout rescales: right on average
    expected = x @ delta_weight(layer.spec, layer.mora_matrix.data).T
    assert (update - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    layer = MoRALinear(base_layer("linear with bias").to(dtype), spec())
    assert layer.mora_matrix.dtype is dtype
    assert layer(inputs().to(dtype)).dtype is dtype
    # A matrix kept in fp32 computes in the input's dtype
    layer.mora_matrix.data = layer.mora_matrix.data.float()
    assert layer(inputs().to(dtype)).dtype is dtype


def test_repr_says_what_it_is():
    text = repr(MoRALinear(base_layer("linear"), spec()))
    assert "mora_matrix=(6, 6)" in text
    assert "rotate/permuted" in text


class Renamed(nn.Linear):
    pass


class Transposed(nn.Linear):
    """Computes as `nn.Linear` by code of its own, as Falcon's layers do."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Router(nn.Linear):
    """Has the shape of `nn.Linear`, and other outputs."""

    def forward(self, x):
        return super().forward(x).softmax(-1)


def test_a_layer_is_linear_by_what_it_computes():
    """In other layers a delta of the weight may mean something else."""
    for layer in (
        nn.Linear(6, 4),
        Conv1D(4, 6),
        Renamed(6, 4),
        Transposed(6, 4),
        Transposed(6, 4, device="meta"),
    ):
        assert is_linear(layer), layer
    for layer in (Router(6, 4), nn.Embedding(6, 4), nn.LayerNorm(4)):
        assert not is_linear(layer), layer
    assert linear_shape(nn.Linear(2, 3)) == linear_shape(Conv1D(3, 2)) == (2, 3)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_keep_their_tables_however_many_there_are(monkeypatch, dropout):
    """A 70B model with domains uses 1,120 operators one after the other: more than the
    cache of tables holds.
    """
    specs = specs_of_tables(monkeypatch)
    layer = MoRALinear(base_layer("linear"), spec(), dropout)
    x = inputs().requires_grad_()
    for _ in range(3):
        layer(x).sum().backward()
        index_tables.tables_of.cache_clear()  # as 64 other layers do
    assert specs == [spec()]
    layer.spec = replace(spec(), seed=2)
    layer(x)
    index_tables.tables_of.cache_clear()
    assert not [key for key in index_tables._tables_in_use if key[0] == spec()], (
        "the last cycle's tables are dropped"
    )
