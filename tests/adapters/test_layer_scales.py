"""Updates that are multiplied by a number of each layer: the operators with a scale, and
models whose layers have one."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import mora_ds
from mora_ds.adapters.config import LoRAConfig, MoRAConfig, config_from_dict
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.inject import config_of, inject, mora_layers, scale_layers
from mora_ds.adapters.kernels.linear import KernelProducts
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops.index_tables import tables_of
from mora_ds.adapters.ops.linear import Compute, LayerProducts, mora_linear
from mora_ds.adapters.ops.mora import mora_update
from mora_ds.adapters.ops.update import spec_from_dict
from mora_ds.parallel.windows import Window
from tests.helpers.errors import user_error
from tests.helpers.models import adapted_model, tiny_model, tokens
from tests.helpers.operators import (
    by_definition,
    outputs_and_gradients,
    random,
    saved_bytes,
    spec_id,
    specs,
)

SCALE = 0.375
some_specs = pytest.mark.parametrize("spec", list(specs())[::13], ids=spec_id)


def scaled(spec):
    return replace(spec, scale=SCALE)


def value_of(spec):
    return random(*spec.adapter_weight_shape, seed=5)


# -- operators -------------------------------------------------------------------------


@some_specs
def test_every_use_of_an_operator_has_its_scale(spec):
    value = value_of(spec)
    other = scaled(spec)
    delta = SCALE * spec.delta_weight(value)
    x = random(3, spec.d_in)
    g = random(3, spec.d_out)
    total = random(spec.d_out, spec.d_in, seed=6)
    formed = other.delta_weight(value)
    assert_close(formed, delta)
    assert torch.equal(other.merged_weight(total, value), total + formed)
    assert_close(other.add_update_(g.clone(), value, x), g + x @ delta.T)
    assert_close(other.add_input_gradient_(x.clone(), value, g), x + g @ delta)
    assert_close(mora_update(other, value, x), x @ delta.T)
    if factors := other.low_rank(value):
        assert_close(factors[1] @ factors[0], delta)


@pytest.mark.parametrize("path", [Compute.ACTIVATION, Compute.WEIGHT])
@some_specs
def test_a_layer_and_its_gradients_have_the_scale(spec, path):
    """By plain torch, and by the operations of the kernels."""
    other = scaled(spec)
    tables = KernelTables(other, torch.device("cpu"))
    expected = outputs_and_gradients(other, torch.float64, by_definition(other))
    for products in (LayerProducts(other), KernelProducts(tables)):

        def layer(x, weight, bias, mora_matrix, products=products):
            return mora_linear(x, weight, bias, mora_matrix, products, path)

        found = outputs_and_gradients(other, torch.float64, layer)
        for one, right in zip(found, expected, strict=True):
            assert_close(one, right, rtol=1e-11, atol=1e-10)


@some_specs
def test_windows_have_the_scale_of_their_operator(spec):
    other = scaled(spec)
    weight = torch.zeros(spec.d_out, spec.d_in, dtype=torch.float64)
    products = LayerProducts(Window(other, (0, spec.d_in), (0, spec.d_out)))
    value = value_of(spec)
    formed = products.effective_weight(weight, products.full(value))
    assert_close(formed, other.delta_weight(value))


def test_a_scale_saves_no_more_for_backward_and_shares_the_tables():
    spec = next(specs())
    weight = torch.zeros(spec.d_out, spec.d_in)
    bytes_saved = []
    for each in (spec, scaled(spec)):
        x = torch.ones(4, spec.d_in)
        value = value_of(spec).float().requires_grad_()
        products = LayerProducts(each)

        def step(x=x, value=value, products=products):
            return mora_linear(x, weight, None, value, products, Compute.ACTIVATION)

        bytes_saved.append(saved_bytes(step))
    assert bytes_saved[0] == bytes_saved[1]
    cpu = torch.device("cpu")
    assert tables_of(spec, cpu) is tables_of(scaled(spec), cpu)


def test_files_name_a_scale_only_where_there_is_one():
    spec = next(specs())
    assert "scale" not in spec.to_dict()
    for each in (spec, scaled(spec)):
        assert spec_from_dict(each.to_dict()) == each
    for wrong in (0.0, -1.0, float("inf")):
        with user_error("the scale of an operator must be above 0"):
            replace(spec, scale=wrong)


# -- models ----------------------------------------------------------------------------


def scales_of(model):
    """A power of two for each layer, so that products by it are exact."""
    return {name: 2.0 ** -(index % 5) for index, name in enumerate(mora_layers(model))}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"operator": "rotate", "grouping": "plain"},
        {"family": "gpt2", "dropout": 0.1},
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
        scales = scales_of(model)
        for name, layer in mora_layers(model).items():
            for parameter in layer.parameters(recurse=False):
                parameter.data += 0.01
                parameter.data *= 1.0 if is_scaled else scales[name]
        if is_scaled:
            scale_layers(model, scales)
        domain = "b" if "domains" in case else None
        with torch.no_grad(), domains_of(model).using(domain):
            logits.append(model(tokens(2)).logits)
    assert_close(*logits, rtol=1e-5, atol=1e-6)


def test_lora_has_the_scale_in_its_alpha():
    model = tiny_model()
    inject(model, LoRAConfig(rank=2, alpha=3.0))
    scales = scales_of(model)
    scale_layers(model, scales)
    for name, layer in mora_layers(model).items():
        assert layer.spec.alpha == 3.0 * scales[name]


def test_the_config_keeps_the_scales():
    model = tiny_model()
    inject(model, MoRAConfig(rank=2))
    assert "layer_scales" not in config_of(model).to_dict()
    config = scale_layers(model, scales_of(model))
    assert config_from_dict(config.to_dict()) == config
    again = tiny_model()
    mora_ds.inject(again, config)
    for name, layer in mora_layers(model).items():
        assert mora_layers(again)[name].spec == layer.spec
        assert layer.spec.scale == config.scale_of(name)


def test_wrong_scales_are_refused_by_name():
    for scales, message in (
        ({"a": 0.0}, "`layer_scales`: a must be above 0, got 0.0"),
        ({"a": "x"}, "layer_scales must be numbers by names of layers"),
    ):
        with user_error(message):
            MoRAConfig(layer_scales=scales)
    with user_error("`layer_scales` have no number for b"):
        MoRAConfig(layer_scales={"a": 1.0}).operator_for("b", 8, 8, 0)
