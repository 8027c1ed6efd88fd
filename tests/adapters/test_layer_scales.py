"""Updates that are multiplied by a number of each layer: the operators with a scale, and
models whose layers have one."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from mora_ds.adapters.config import LoRAConfig, MoRAConfig, config_from_dict
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.inject import mora_layers, scale_layers
from mora_ds.adapters.ops.index_tables import tables_of
from mora_ds.adapters.registry import spec_from_dict
from tests.helpers.errors import user_error
from tests.helpers.models import adapted_model, tokens
from tests.helpers.operators import random, spec_id, specs

CPU = torch.device("cpu")
SCALED = [spec for spec in specs() if spec.scale != 1]


@pytest.mark.parametrize("spec", SCALED[::4], ids=spec_id)
def test_an_operator_with_a_scale_multiplies_its_update(spec):
    """That all else computes with this update, tests/adapters/ops and
    tests/adapters/kernels show of operators with and without a scale."""
    plain = replace(spec, scale=1.0)
    matrix = random(spec.r_hat, spec.r_hat)
    assert_close(spec.delta_weight(matrix), spec.scale * plain.delta_weight(matrix))
    assert tables_of(spec, CPU) is tables_of(plain, CPU)
    assert spec_from_dict(spec.to_dict()) == spec
    assert "scale" not in plain.to_dict(), "files without scales stay as they were"


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
