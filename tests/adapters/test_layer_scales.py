"""Updates that are multiplied by a number of each layer: the operators with a scale, and
models whose layers have one."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from mora_ds.adapters.config import LoRAConfig, MoRAConfig, config_from_dict
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.inject import mora_layers, scale_layers
from mora_ds.adapters.kernels.linear import KernelProducts
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops.index_tables import tables_of
from mora_ds.adapters.ops.linear import Compute, mora_linear
from mora_ds.adapters.ops.mora import mora_update
from mora_ds.adapters.ops.update import spec_from_dict
from tests.helpers.errors import user_error
from tests.helpers.models import adapted_model, tokens
from tests.helpers.operators import (
    by_definition,
    by_path,
    outputs_and_gradients,
    random,
    spec_id,
    specs,
)

CPU = torch.device("cpu")
some_specs = pytest.mark.parametrize("spec", list(specs())[::13], ids=spec_id)


@some_specs
def test_every_use_of_an_operator_has_its_scale(spec):
    scaled = replace(spec, scale=0.375)
    matrix = random(spec.r_hat, spec.r_hat, seed=5)
    delta = 0.375 * spec.delta_weight(matrix)
    x = random(3, spec.d_in)
    g = random(3, spec.d_out)
    weight = random(spec.d_out, spec.d_in, seed=6)
    formed = scaled.delta_weight(matrix)
    assert_close(formed, delta)
    assert torch.equal(scaled.merged_weight(weight, matrix), weight + formed)
    assert_close(scaled.add_update_(g.clone(), matrix, x), g + x @ delta.T)
    assert_close(scaled.add_input_gradient_(x.clone(), matrix, g), x + g @ delta)
    assert_close(mora_update(scaled, matrix, x), x @ delta.T)
    if factors := scaled.low_rank(matrix):
        assert_close(factors[1] @ factors[0], delta)
    assert tables_of(scaled, CPU) is tables_of(spec, CPU)
    assert spec_from_dict(scaled.to_dict()) == scaled
    assert "scale" not in spec.to_dict(), "files without scales stay as they were"


@pytest.mark.parametrize("path", [Compute.ACTIVATION, Compute.WEIGHT])
@some_specs
def test_a_layer_and_its_gradients_have_the_scale(spec, path):
    """By plain torch, and by the operations of the kernels."""
    scaled = replace(spec, scale=0.375)
    products = KernelProducts(KernelTables(scaled, CPU))

    def by_kernels(x, weight, bias, mora_matrix):
        return mora_linear(x, weight, bias, mora_matrix, products, path)

    expected = outputs_and_gradients(scaled, torch.float64, by_definition(scaled))
    for layer in (by_path(scaled, path), by_kernels):
        results = outputs_and_gradients(scaled, torch.float64, layer)
        assert_close(results, expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize(
    "case",
    [
        {"operator": "rotate", "grouping": "plain"},
        {"family": "gpt2"},
        {"family": "mixtral", "target_modules": ("all-linear", "experts")},
        {"domains": ("a", "b")},
        {"base_bits": 8},
    ],
    ids=str,
)
def test_a_model_with_scales_computes_as_one_whose_matrices_are_multiplied(case):
    logits = []
    for is_scaled in (True, False):
        model = adapted_model(**case).eval()
        layers = mora_layers(model)
        # Powers of two, so that products by them are exact
        scales = {name: 2.0 ** -(index % 5) for index, name in enumerate(layers)}
        for name, layer in layers.items():
            for parameter in layer.parameters(recurse=False):
                parameter.data += 0.01
                parameter.data *= 1.0 if is_scaled else scales[name]
        if is_scaled:
            scale_layers(model, scales)
        domain = "b" if "domains" in case else None
        with torch.no_grad(), domains_of(model).using(domain):
            logits.append(model(tokens(2)).logits)
    assert_close(*logits, rtol=1e-5, atol=1e-6)


def test_a_config_keeps_its_scales():
    scales = {"b": 0.5, "a": 2}
    for config in (MoRAConfig(layer_scales=scales), LoRAConfig(layer_scales=scales)):
        assert config_from_dict(config.to_dict()) == config
    assert config.operator_for("a", 64, 64, 0).alpha == 2 * LoRAConfig.rank * 2
    assert "layer_scales" not in MoRAConfig().to_dict(), "files stay as they were"


def test_wrong_scales_are_refused_by_name():
    with user_error(r"layer_scales\[0\]\[1\] must be above 0, got 0.0"):
        MoRAConfig(layer_scales={"a": 0})
    with user_error("`layer_scales` have no number for b"):
        MoRAConfig(layer_scales={"a": 1}).operator_for("b", 8, 8, 0)
