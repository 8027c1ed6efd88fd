"""Every MoRA operator on every shape that the tests try, and a layer computed in each of
the two ways.
"""

import torch
import torch.nn.functional as F

from mora_ds.adapters.ops import index_tables
from mora_ds.adapters.ops.index_tables import OPERATORS
from mora_ds.adapters.ops.linear import LayerProducts, mora_linear
from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight
from mora_ds.adapters.ops.spec import OperatorKind
from tests.helpers import plain_kernels  # noqa: F401  (layers of a CPU can take the path of a GPU)
from tests.helpers.tables import rows

KINDS_AND_GROUPINGS = [
    (kind, grouping) for kind in OperatorKind for grouping in OPERATORS[kind].groupings
]
SHAPES = """
# d_in =, <, > d_out; divisible
16 | 16 | 4
12 | 20 | 4
20 | 12 | 4
# not divisible
13 | 7 | 4
7 | 13 | 4
33 | 17 | 6
17 | 33 | 6
11 | 11 | 4
# r_hat larger than a side, or both
5 | 3 | 8
3 | 5 | 8
5 | 12 | 8
12 | 5 | 8
8 | 3 | 8
# many blocks on one side
40 | 128 | 18
128 | 40 | 18
5 | 40 | 2
40 | 5 | 2
3 | 100 | 2
100 | 3 | 2
# tiny, and one block
1 | 1 | 2
1 | 9 | 2
9 | 1 | 2
6 | 6 | 6
# odd sides: all but rotate
13 | 7 | 5
7 | 13 | 3
9 | 9 | 1
1 | 1 | 1
20 | 6 | 7
"""
"""d_in | d_out | r_hat"""


def specs():
    for kind, grouping in KINDS_AND_GROUPINGS:
        for d_in, d_out, r_hat in (map(int, row) for row in rows(SHAPES)):
            if r_hat % OPERATORS[kind].smallest_side:
                continue
            yield OperatorSpec(kind, d_in, d_out, r_hat, grouping, 17)


def spec_id(spec):
    return (
        f"{spec.kind.value}-{spec.grouping.value}-{spec.d_in}-{spec.d_out}-{spec.r_hat}"
    )


def blocks_onto_wrapped_outputs(spec):
    """One number of each block in turn onto one output in turn, from the first again:
    an output reads several blocks, each with another row of M."""
    numbers = torch.arange(spec.blocks_in * spec.r_hat).unsqueeze(0)
    return numbers % spec.d_in, numbers % spec.d_out


def specs_of_tables(monkeypatch):
    """A list that fills with the operators whose tables are made from now on."""
    made = index_tables.make_tables
    specs = []
    monkeypatch.setattr(
        index_tables,
        "make_tables",
        lambda spec, device: specs.append(spec) or made(spec, device),
    )
    index_tables.clear_tables()
    return specs


def random(*shape, seed=0):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def assert_same_bits_for_every_number_of_threads(compute):
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(compute())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def saved_bytes(step, *not_counted):
    """Bytes of the storages that autograd saves from a forward, each once."""
    storages = {}
    excluded = {tensor.untyped_storage().data_ptr() for tensor in not_counted}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        y = step()
    assert y.requires_grad
    return sum(storages.values())


def outputs_and_gradients(spec, dtype, layer):
    """2 y, dL/dx, dL/dM of one layer, in float64; y is doubled in place, which a model may
    do with a layer's output.
    """
    x = random(2, 3, spec.d_in)
    mora_matrix = random(spec.r_hat, spec.r_hat, seed=1)
    weight = random(spec.d_out, spec.d_in, seed=2)
    bias = random(spec.d_out, seed=3)
    g = random(2, 3, spec.d_out, seed=4)
    x = x.to(dtype).requires_grad_()
    mora_matrix = mora_matrix.to(dtype).requires_grad_()
    y = layer(x, weight.to(dtype), bias.to(dtype), mora_matrix).mul_(2)
    return tuple(
        tensor.double()
        for tensor in (y, *torch.autograd.grad(y, (x, mora_matrix), g.to(dtype)))
    )


def by_definition(spec):
    return lambda x, weight, bias, mora_matrix: F.linear(
        x, weight + delta_weight(spec, mora_matrix), bias
    )


def by_path(spec, path):
    return lambda x, weight, bias, mora_matrix: mora_linear(
        x, weight, bias, mora_matrix, LayerProducts(spec), path
    )
