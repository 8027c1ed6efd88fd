"""torch.compile: a layer is one graph, before any eager call, with the numbers of the
eager layer.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import mora_ds
from mora_ds.adapters.inject import inject
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.index_tables import clear_tables
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from tests.helpers.models import causal_loss, tiny_model, tokens
from tests.helpers.operators import random


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
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


@pytest.mark.parametrize("kind", list(OperatorKind))
def test_a_layer_is_one_graph_before_its_first_call(kind):
    layer = layer_of(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    of_graph = results(layer, compiled)
    assert counter.frame_count == 1
    assert_close(of_graph, results(layer, layer), rtol=1e-12, atol=1e-12)


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


@pytest.mark.heavy
@pytest.mark.parametrize("operator", ["rotate", "share"])
def test_an_adapted_model_is_one_graph_of_inductor(operator):
    model = tiny_model()
    inject(model, mora_ds.MoRAConfig(rank=4, operator=operator))
    values = [p for p in model.parameters() if p.requires_grad]
    for index, value in enumerate(values):
        value.data = 0.05 * random(*value.shape, seed=index).to(value)
    compiled = torch.compile(model, fullgraph=True)
    losses = []
    gradients = []
    for each in (compiled, model):
        loss = causal_loss(each, tokens(3))
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, values))
    assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
