"""All ways to compute a layer are base + delta, forward and backward, on every operator,
shape and kind of device.
"""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mora_ds.adapters.kernels.linear import KernelProducts
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops import mora
from mora_ds.adapters.ops.linear import (
    Compute,
    LayerProducts,
    cheaper_path,
    mora_linear,
)
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.parallel.windows import Window
from tests.helpers.operators import (
    by_definition,
    by_path,
    outputs_and_gradients,
    random,
    saved_bytes,
    spec_id,
    specs,
)

PATHS = (Compute.ACTIVATION, Compute.WEIGHT)
all_paths = pytest.mark.parametrize("path", PATHS)


@pytest.mark.parametrize("spec", list(specs()), ids=spec_id)
def test_all_paths_are_base_plus_delta(spec, monkeypatch):
    expected = outputs_and_gradients(spec, torch.float64, by_definition(spec))
    # The gradient of M is summed over several parts of the tokens
    monkeypatch.setattr(mora, "tokens_in_cache", lambda x, width: 4)
    for sums in (True, False):  # as on a CPU, as on a GPU
        monkeypatch.setattr(mora, "on_cpu", lambda x, sums=sums: sums)
        for path in PATHS:
            results = outputs_and_gradients(spec, torch.float64, by_path(spec, path))
            for one, right in zip(results, expected, strict=True):
                assert_close(one, right, rtol=1e-11, atol=1e-10)


@all_paths
@pytest.mark.parametrize(
    "spec", [s for s in specs() if max(s.d_in, s.d_out) > 1][::5], ids=spec_id
)
def test_all_paths_in_bf16(spec, path):
    """The products differ from fp32, within the rounding of bf16."""
    expected = outputs_and_gradients(spec, torch.float64, by_definition(spec))
    for result, right in zip(
        outputs_and_gradients(spec, torch.bfloat16, by_path(spec, path)),
        expected,
        strict=True,
    ):
        assert (result - right).norm() <= 8 * torch.finfo(
            torch.bfloat16
        ).eps * right.norm()


@all_paths
@pytest.mark.parametrize("kind", [OperatorKind.SHARE, OperatorKind.ROTATE])
def test_input_without_a_batch_dimension(kind, path):
    spec = OperatorSpec(kind, 12, 8, 4)
    weight = random(8, 12, seed=1)
    mora_matrix = random(4, 4, seed=2).requires_grad_()

    def computed(x):
        """Output and gradients, flat."""
        x.requires_grad_()
        y = mora_linear(x, weight, None, mora_matrix, LayerProducts(spec), path)
        return [
            tensor.flatten()
            for tensor in (y, *torch.autograd.grad(y.square().sum(), (x, mora_matrix)))
        ]

    x = random(1, 12)
    assert all(
        torch.equal(one, same)
        for one, same in zip(computed(x[0].clone()), computed(x.clone()), strict=True)
    )


# -- memory ----------------------------------------------------------------------------


@all_paths
@pytest.mark.parametrize("sums", [True, False])
def test_operator_share_saves_only_the_folded_input(path, sums, monkeypatch):
    """Checked in plain torch, as on a CPU and as on a GPU, and with the operations of
    the kernels."""
    monkeypatch.setattr(mora, "on_cpu", lambda x: sums)
    spec = OperatorSpec(OperatorKind.SHARE, 64, 64, 16, Grouping.PERMUTED, seed=1)
    x = torch.randn(40, 64, requires_grad=True)
    weight = torch.randn(64, 64)
    mora_matrix = torch.randn(16, 16, requires_grad=True)
    kernels = KernelProducts(KernelTables(spec, x.device))
    for products in (LayerProducts(spec), kernels):
        step = partial(mora_linear, x, weight, None, mora_matrix, products, path)
        assert saved_bytes(step, weight, mora_matrix) == 40 * 16 * 4


@all_paths
def test_rotate_keeps_the_input_that_others_read_too(path):
    spec = OperatorSpec(OperatorKind.ROTATE, 32, 32, 8, Grouping.PERMUTED, seed=1)
    x = torch.randn(9, 32, requires_grad=True)
    mora_matrix = torch.randn(8, 8, requires_grad=True)
    weight = torch.randn(32, 32)
    assert (
        saved_bytes(
            lambda: mora_linear(
                x, weight, None, mora_matrix, LayerProducts(spec), path
            ),
            weight,
            mora_matrix,
            x,
        )
        == 0
    )


# -- the rule --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "d_in, d_out, tokens",
    [(1024, 1024, 256), (2752, 1024, 374), (576, 1536, 210), (1, 9, 1)],
)
def test_the_rule_takes_the_weight_from_a_number_of_tokens_on(d_in, d_out, tokens):
    """Literal numbers: another rule would change the bits of every run."""
    assert cheaper_path(tokens, d_in, d_out) is Compute.WEIGHT
    assert cheaper_path(tokens - 1, d_in, d_out) is Compute.ACTIVATION


def test_the_rule_counts_the_part_of_a_layer_that_a_process_computes():
    """A layer of 16 x 16 is computed over the activations for 1 token, its part of 16 x 2
    over the weight."""
    spec = OperatorSpec(OperatorKind.SHARE, 16, 16, 8)
    products = LayerProducts(Window(spec, (0, 16), (0, 2)))
    x = random(1, 16).float()
    weight = random(2, 16, seed=1).float()
    mora_matrix = random(8, 8, seed=2).float()
    with patch.object(products, "output", side_effect=AssertionError):
        mora_linear(x, weight, None, mora_matrix, products, Compute.AUTO)


@pytest.mark.parametrize("tokens", [2, 8])
def test_auto_computes_what_the_named_path_computes(tokens):
    """Equal to the bit. The tokens of all rows are counted, for each call
    separately."""
    spec = OperatorSpec(OperatorKind.ROTATE, 16, 16, 8, Grouping.PERMUTED, seed=1)
    base = nn.Linear(16, 16)
    mora_matrix = random(8, 8).float()
    x = random(2, tokens // 2, 16, seed=1).float()
    path = Compute.WEIGHT if tokens == 8 else Compute.ACTIVATION
    outputs = {}
    for compute in (Compute.AUTO, *PATHS):
        layer = MoRALinear(base, spec, compute=compute)
        layer.mora_matrix.data.copy_(mora_matrix)
        outputs[compute] = layer(x)
    assert torch.equal(outputs[Compute.AUTO], outputs[path])
    assert not torch.equal(outputs[Compute.ACTIVATION], outputs[Compute.WEIGHT]), (
        "or this test shows nothing"
    )
