"""LoRA: its formula, its merges (ReLoRA) under every ZeRO stage, its export."""

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mora_ds.adapters.config import LoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import LoRALinear
from mora_ds.adapters.ops.lora import LoRASpec, lora_update
from mora_ds.adapters.registry import spec_from_dict
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.remora.ledger import Ledger
from tests.helpers.engines import assert_replayed, ds_config, merging_run
from tests.helpers.models import tiny_model
from tests.helpers.operators import assert_same_bits_for_every_number_of_threads
from tests.helpers.pool import run_pooled

SPEC = LoRASpec(d_in=12, d_out=7, rank=3, alpha=4.5)


def random_factors(spec):
    return torch.randn(
        spec.rank, spec.d_in + spec.d_out, generator=torch.Generator().manual_seed(0)
    )


def test_update_and_delta_agree_with_the_formula():
    factors = random_factors(SPEC)
    down = factors[:, :12]
    up = factors[:, 12:].T
    expected = SPEC.alpha / SPEC.rank * up @ down
    assert_close(SPEC.delta_weight(factors), expected)
    assert_close(SPEC.delta_weight(SPEC.scaled(factors, 3.0)), 3 * expected)
    a, b = SPEC.low_rank(factors)
    assert_close(b @ a, expected)
    x = torch.randn(5, 2, 12)
    assert_close(lora_update(SPEC, factors, x), F.linear(x, expected))


def test_delta_has_the_same_bits_for_every_number_of_threads():
    spec = LoRASpec(300, 200, 5, 10.0)
    assert_same_bits_for_every_number_of_threads(
        lambda: spec.delta_weight(random_factors(spec))
    )


def test_a_cycle_starts_from_a_random_a_and_a_zero_b():
    first = SPEC.init_weight(torch.empty(0), seed=5)
    assert torch.equal(first, SPEC.init_weight(torch.empty(0), seed=5))
    assert not torch.equal(first, SPEC.init_weight(torch.empty(0), seed=6))
    assert (first[:, :12] != 0).all()
    assert not first[:, 12:].any()
    assert first.abs().max() <= 12**-0.5
    assert not SPEC.delta_weight(first).any()


def test_spec_survives_json():
    assert spec_from_dict(SPEC.to_dict()) == SPEC


def test_a_rank_beyond_the_shorter_side_is_reduced():
    report = inject(tiny_model("llama"), LoRAConfig(rank=20))
    cut = {row.name: row for row in report.rows}["k_proj"]
    assert cut.size == 16


def test_gradients_are_those_of_the_two_matrices():
    base = torch.nn.Linear(12, 7)
    layer = LoRALinear(base, SPEC, seed=3)
    factors = random_factors(SPEC)
    layer.factors.data.copy_(factors)
    x = torch.randn(4, 12)
    down, up = (
        factor.clone().requires_grad_()
        for factor in (factors[:, :12], factors[:, 12:].T)
    )
    (
        F.linear(x, base.weight.detach(), base.bias.detach()) + 1.5 * x @ down.T @ up.T
    ).square().sum().backward()
    layer(x).square().sum().backward()
    assert_close(layer.factors.grad, torch.cat((down.grad, up.grad.T), dim=1))


# -- ReLoRA: real ranks ----------------------------------------------------------------


@pytest.mark.parametrize("stage, dtype", [(3, "float32"), (2, "bfloat16")])
def test_relora_merged_base_equals_its_replayed_ledger(
    tmp_path, base_folder, merged, out, stage, dtype
):
    config = LoRAConfig(rank=3)
    ranks = run_pooled(2, merging_run, str(tmp_path), config, stage, dtype, 4)
    assert all(report["mora_matrix_norm"] > 0 for report in ranks[0]["reports"])
    assert Ledger.open(out / "ledger").cycles == 4
    assert_replayed(ranks, tmp_path)
    exported = export_merged(out, merged, verify=True)
    assert exported.comparison is not None
    loaded = load_adapter(base_folder, out)
    for name, layer in mora_layers(loaded).items():
        first = layer.spec.init_weight(layer.frozen, config.first_seed(name, 4))
        assert all(torch.equal(result["values"][name], first) for result in ranks)
        assert torch.equal(layer.weight, ranks[0]["weights"][name])
        assert torch.equal(layer.adapter_weight, first.to(layer.weight.dtype))


def set_everywhere():
    """`zero.set_fp32` at every stage and dtype, against what the engine then holds and
    computes with.
    """
    wrong = []
    for stage in (1, 2, 3):
        for section, dtype in (
            ("", torch.float32),
            ("bf16", torch.bfloat16),
            ("fp16", torch.float16),
        ):
            model = tiny_model("llama")
            inject(model, LoRAConfig(rank=3))
            half = {section: {"enabled": True}} if section else {}
            engine, *_ = initialize(model=model, config=ds_config(stage, 2, 1, **half))
            for layer in mora_layers(model).values():
                full = random_factors(layer.spec)
                zero.set_fp32(engine, {layer.adapter_weight: full})
                master = zero.full_fp32(layer.adapter_weight)
                with deepspeed.zero.GatheredParameters(
                    [layer.adapter_weight], enabled=stage == 3
                ):
                    low = layer.adapter_weight.detach().clone()
                if not torch.equal(master, full) or not torch.equal(
                    low, full.to(dtype)
                ):
                    wrong.append(f"stage {stage} {dtype}")
    return wrong


def test_a_parameter_is_set_in_all_its_copies():
    assert run_pooled(2, set_everywhere) == [[], []]
