"""torch.compile: a layer is one graph, before any eager call, with the numbers of the
eager layer.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from mora_ds.adapters.domains import DomainLinear, Domains
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.index_tables import clear_tables, tables_of
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from tests.helpers.operators import random, specs_of_tables
from tests.helpers.tables import heavy


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    clear_tables()


def layer_of(kind, d_in=24, d_out=40, seed=3):
    spec = OperatorSpec(kind, d_in, d_out, 10, Grouping.PERMUTED, seed)
    base = nn.Linear(d_in, d_out, dtype=torch.float64)
    base.weight.data = random(d_out, d_in, seed=1)
    base.bias.data = random(d_out, seed=2)
    layer = MoRALinear(base, spec)
    layer.mora_matrix.data = random(10, 10, seed=4)
    return layer


def results(layer, call):
    """The output and both gradients."""
    x = random(2, 5, layer.in_features, seed=5).requires_grad_()
    y = call(x)
    return y, *torch.autograd.grad(y.square().sum(), (x, layer.mora_matrix))


CASES = [(kind, "aot_eager") for kind in OperatorKind]
CASES += [heavy(kind, "inductor") for kind in OperatorKind]


@pytest.mark.parametrize("kind, backend", CASES)
def test_a_layer_is_one_graph_before_its_first_call(kind, backend):
    layer = layer_of(kind)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    of_graph = results(layer, compiled)
    assert counter.frame_count == 1
    assert_close(of_graph, results(layer, layer), rtol=1e-12, atol=1e-12)


def test_layers_of_8_bits_and_with_domains_are_one_graph():
    packed = layer_of(OperatorKind.SHARE)
    packed.quantize(packed.weight.clone(), 8)
    domains = Domains(("law", "code"))
    of_domains = DomainLinear(nn.Linear(24, 40), packed.spec, domains, 0.0).double()
    of_domains.domain_mora_matrices.data = random(2, 10, 10, seed=6)
    domains.set(["code", "law"])
    for layer in (packed, of_domains):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        of_graph = results(layer, compiled)
        assert_close(of_graph, results(layer, layer), rtol=1e-12, atol=1e-12)


def test_graphs_keep_their_tables_however_many_there_are(monkeypatch):
    specs = specs_of_tables(monkeypatch)
    layer = layer_of(OperatorKind.SHARE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        results(layer, compiled)
        tables_of.cache_clear()  # as 64 other layers do
    assert len(specs) == 1


def test_other_permutations_take_the_same_graph():
    """Those of the next cycle, and of another layer of the same sizes."""
    layer = layer_of(OperatorKind.ROTATE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    results(layer, compiled)
    layer.spec = replace(layer.spec, seed=4)
    of_graph = results(layer, compiled)
    assert counter.frame_count == 1
    assert_close(of_graph, results(layer, layer), rtol=1e-12, atol=1e-12)
