"""The GPU's paths of a layer, by their operations in plain torch: base + delta, forward and
backward; and how many kernels they start, counted on the meta device, which runs what CUDA
runs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mora_ds.adapters.kernels.linear import KernelProducts
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.int8 import Int8Weight, quantize
from mora_ds.adapters.ops.linear import Compute, LayerProducts, mora_linear
from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.adapters.ops.updates import merged_weight
from tests.helpers.operators import by_definition, outputs_and_gradients, random, specs

CPU = torch.device("cpu")
by_kind = pytest.mark.parametrize("kind", list(OperatorKind))
both_paths = pytest.mark.parametrize("path", [Compute.ACTIVATION, Compute.WEIGHT])

MOST_KERNELS = {OperatorKind.SHARE: 10, OperatorKind.ROTATE: 14}
"""Kernels that a layer starts in forward and backward."""

SYNCS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "item",
    "unique",
    "masked_select",
    "to_copy_cpu",
}
"""Operations that wait for the device."""


def by_kernels(spec, path):
    """Half with the bias in the product, half with it after a product that starts from the
    update.
    """
    products = KernelProducts(KernelTables(spec, CPU))

    def layer(x, weight, bias, mora_matrix):
        with_bias = mora_linear(x, weight, bias, mora_matrix, products, path)
        return (
            with_bias + mora_linear(x, weight, None, mora_matrix, products, path) + bias
        ) / 2

    return layer


@both_paths
@by_kind
def test_both_paths_are_base_plus_delta(kind, path):
    for spec in specs():
        if spec.kind is kind:
            expected = outputs_and_gradients(spec, torch.float64, by_definition(spec))
            results = outputs_and_gradients(spec, torch.float64, by_kernels(spec, path))
            # rotate's cosines are fp32
            for one, right in zip(results, expected, strict=True):
                assert torch.allclose(one, right, rtol=1e-6, atol=1e-6), spec


@both_paths
def test_both_paths_of_no_tokens(path):
    """An expert that is a module of its own may get no tokens."""
    for spec in specs():
        x = torch.empty(0, spec.d_in, requires_grad=True)
        mora_matrix = torch.ones(spec.r_hat, spec.r_hat, requires_grad=True)
        y = mora_linear(
            x,
            torch.ones(spec.d_out, spec.d_in),
            None,
            mora_matrix,
            KernelProducts(KernelTables(spec, CPU)),
            path,
        )
        assert y.shape == (0, spec.d_out)
        of_x, of_m = torch.autograd.grad(y.sum(), (x, mora_matrix))
        assert of_x.shape == x.shape
        assert torch.equal(of_m, torch.zeros_like(mora_matrix))


@both_paths
@by_kind
def test_both_paths_in_bf16(kind, path):
    for spec in [
        spec for spec in specs() if spec.kind is kind and max(spec.d_in, spec.d_out) > 1
    ][::5]:
        expected = outputs_and_gradients(spec, torch.float64, by_definition(spec))
        results = outputs_and_gradients(spec, torch.bfloat16, by_kernels(spec, path))
        for one, right in zip(results, expected, strict=True):
            assert (one - right).norm() <= 4 * torch.finfo(
                torch.bfloat16
            ).eps * right.norm(), spec


@both_paths
def test_a_model_in_fp32_computes_under_autocast(path):
    spec = OperatorSpec(OperatorKind.ROTATE, 24, 12, 6, Grouping.PERMUTED, seed=1)
    x, weight, mora_matrix = (
        random(*shape).float() for shape in ((5, 24), (12, 24), (6, 6))
    )
    products = KernelProducts(KernelTables(spec, CPU))
    expected = mora_linear(x, weight, None, mora_matrix, products, path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = mora_linear(x, weight, None, mora_matrix, products, path)
    assert y.dtype is torch.bfloat16
    assert (y.float() - expected).norm() <= 4 * torch.finfo(
        torch.bfloat16
    ).eps * expected.norm()


@by_kind
def test_the_rebuilt_weight_has_the_bits_of_the_plain_path(kind):
    for spec in specs():
        if spec.kind is kind:
            check_formed(spec)


def check_formed(spec):
    mora_matrix = random(spec.r_hat, spec.r_hat).float()
    weight = random(spec.d_out, spec.d_in, seed=1).float()
    plain = LayerProducts(spec)
    kernels = KernelProducts(KernelTables(spec, CPU))
    formed = kernels.effective_weight(weight, mora_matrix)
    assert torch.equal(formed, plain.effective_weight(weight, mora_matrix))
    transposed = kernels.effective_weight(weight.T.contiguous().T, mora_matrix)
    assert torch.equal(formed, transposed)
    small = Int8Weight(*quantize(weight))
    dequantized = small.values * small.scales.unsqueeze(1)
    in_8_bits = kernels.effective_weight(small, mora_matrix)
    assert torch.equal(in_8_bits, plain.effective_weight(dequantized, mora_matrix))


def test_a_quantized_weight_has_the_product_of_its_dense_one():
    spec = OperatorSpec(OperatorKind.ROTATE, 24, 12, 6, Grouping.PERMUTED, seed=1)
    products = KernelProducts(KernelTables(spec, CPU))
    small = Int8Weight(*quantize(random(12, 24)))
    mora_matrix = random(6, 6).float()
    results = []
    for weight in (small, small.dense(torch.float32)):
        x = random(5, 24, seed=1).float().requires_grad_()
        y = mora_linear(x, weight, None, mora_matrix, products, Compute.ACTIVATION)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(*results)


# -- the layer -------------------------------------------------------------------------


def test_a_layer_on_a_device_with_kernels_uses_them_and_a_merge_does_not(monkeypatch):
    """The kernels are replaced by plain torch. The tables follow the cycle; a merge has
    the bits of plain operations."""
    monkeypatch.setattr("mora_ds.adapters.layer.KERNEL_DEVICES", ("cpu",))
    spec = OperatorSpec(OperatorKind.SHARE, 12, 8, 6, Grouping.PERMUTED, seed=1)
    base = nn.Linear(12, 8)
    x = torch.randn(5, 12)
    mora_matrix = torch.randn(6, 6)
    original = base.weight.data.clone()
    layer = MoRALinear(base, spec, compute=Compute.WEIGHT)
    layer.mora_matrix.data.copy_(mora_matrix)
    for seed in (1, 2):
        layer.spec = replace(spec, seed=seed)
        with Kernels() as kernels:
            y = layer(x)
        assert (
            kernels.started["mora_ds.effective_weight"]
            == kernels.started["mora_ds.gather_sum"]
            == 1
        )
        torch.testing.assert_close(
            y, F.linear(x, original + delta_weight(layer.spec, mora_matrix), base.bias)
        )
    assert {name for name, _ in layer.named_buffers()} >= {
        "tables.fold",
        "tables.unfold",
        "tables.spread",
    }
    assert not layer.state_dict().keys() & {"tables.fold", "weight"}
    assert layer.to(torch.bfloat16).tables.fold.dtype is torch.int32
    with Kernels() as kernels:
        layer.float().merge(original, [(layer.spec, mora_matrix)], mora_matrix)
    assert not [name for name in kernels.started if name.startswith("mora_ds")]
    assert torch.equal(
        layer.weight,
        merged_weight(original, [(layer.spec, mora_matrix)], False, torch.float32),
    )


# -- kernels ---------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts the operations that start a kernel: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.started = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = (
            func.name()
            .removeprefix("aten::")
            .replace("::", ".")
            .split(".", 2 if "mora_ds" in func.name() else 1)
        )
        if not (
            func.is_view
            or name[0] in ("empty", "new_empty", "empty_like", "detach", "_unsafe_view")
        ):
            self.started[".".join(name[:2]) if name[0] == "mora_ds" else name[0]] += 1
        return func(*args, **(kwargs or {}))


def meta(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


@both_paths
@by_kind
@pytest.mark.parametrize(
    "shape, bias",
    [((4096, 4096), True), ((4096, 11008), False), ((11008, 4096), False)],
)
def test_a_layer_starts_few_kernels_and_never_waits(shape, kind, bias, path):
    d_in, d_out = shape
    spec = OperatorSpec(kind, d_in, d_out, 256, Grouping.PERMUTED, seed=1)
    x = meta(2, 2048, d_in).requires_grad_()
    mora_matrix = meta(256, 256).requires_grad_()
    weight = meta(d_out, d_in)
    products = KernelProducts(KernelTables(spec, x.device))
    g = meta(2, 2048, d_out)
    with Kernels() as kernels:
        y = mora_linear(
            x, weight, meta(d_out) if bias else None, mora_matrix, products, path
        )
        torch.autograd.grad(y, (x, mora_matrix), g)
    assert not SYNCS & set(kernels.started)
    most = MOST_KERNELS[OperatorKind.ROTATE if spec.blocks > 1 else OperatorKind.SHARE]
    assert kernels.started.total() <= most, kernels.started
