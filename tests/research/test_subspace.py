"""The adapter `subspace`: its update, its sides, and runs that merge, resume and export."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import Ledger
from mora_ds.research.subspace import SubspaceConfig, SubspaceLinear, SubspaceSpec
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import run
from tests.helpers.models import tiny_model, tokens
from tests.helpers.operators import (
    assert_same_bits_for_every_number_of_threads,
    random,
)
from tests.helpers.resume import (
    assert_close_runs,
    assert_same_run,
    interrupted_job,
    stop_and_resume,
)
from tests.helpers.tables import rows

SPEC = SubspaceSpec(11, 7, 3)


def value_of(spec, seed=0):
    """A value whose sides are orthonormal, in fp64."""
    right = torch.linalg.qr(random(spec.d_in, spec.r_hat, seed=seed)).Q.T
    left = torch.linalg.qr(random(spec.d_out, spec.r_hat, seed=seed + 1)).Q.T
    return torch.cat((random(spec.r_hat, spec.r_hat, seed=seed + 2), right, left), 1)


def delta_by_hand(spec, value):
    mora_matrix, right, left = spec.parts(value)
    return left.T @ mora_matrix @ right


# -- the update ------------------------------------------------------------------------


def test_the_update_is_that_of_its_delta():
    value = value_of(SPEC)
    delta = delta_by_hand(SPEC, value)
    close = torch.testing.assert_close
    close(SPEC.delta_weight(value), delta)
    down, up = SPEC.low_rank(value)
    assert down.shape == (3, 11), "a LoRA of rank r_hat"
    close(up @ down, delta)
    close(delta_by_hand(SPEC, SPEC.scaled(value, 0.5)), delta / 2)
    assert torch.equal(SPEC.trained(value), value[:, :3])
    assert not SPEC.init_weight(random(7, 11), seed=1).any()


def test_updates_with_different_sides_are_summed_as_lora():
    values = [value_of(SPEC, seed) for seed in (0, 10)]
    spec, factors = SPEC.joined(values)
    assert spec == SPEC.of_sum(2) == LoRASpec(11, 7, 6, 6)
    expected = sum(delta_by_hand(SPEC, value) for value in values)
    torch.testing.assert_close(spec.delta_weight(factors), expected)


def test_a_merge_has_the_same_bits_for_every_number_of_threads():
    spec = SubspaceSpec(300, 200, 96)
    value = value_of(spec).float()
    assert_same_bits_for_every_number_of_threads(lambda: spec.delta_weight(value))


def test_a_side_longer_than_the_weights_shorter_side():
    with user_error("as many singular vectors as its shorter side"):
        SubspaceSpec(11, 7, 8)
    config = SubspaceConfig(rank=1000)
    assert config.operator_for("layer", 33, 16, 0).r_hat == 16
    with user_error("`operator` is not for subspace: leave it out"):
        SubspaceConfig(operator="rotate")


# -- the layer -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sides_are_leading_singular_vectors(family):
    """Of a Conv1D too; without them a layer computes no number."""
    model = tiny_model(family)
    inject(model, SubspaceConfig(rank=2))
    layer = next(iter(mora_layers(model).values()))
    assert isinstance(layer, SubspaceLinear)
    x = random(3, layer.in_features).float()
    assert layer(x).isnan().all()
    weight = layer.stored_weight
    layer.fixed = layer.fixed_of(weight.double())
    layer.adapter_weight.data = random(*layer.adapter_weight.shape).float()
    value = layer.unshard(layer.adapter_weight.detach())
    mora_matrix, right, left = layer.spec.parts(value)
    values = torch.linalg.svdvals(weight)[: layer.spec.r_hat]
    torch.testing.assert_close(left @ weight @ right.T, values.diag())
    expected = x @ weight.T + x @ right.T @ mora_matrix.T @ left
    if layer.bias is not None:
        expected = expected + layer.bias
    torch.testing.assert_close(layer(x), expected)


# -- runs ------------------------------------------------------------------------------

MERGING = (
    "--adapter subspace --mora_rank 2 --r_hat_multiple 2 --max_steps 9 --merge_every 3 "
    "--restart_warmup_steps 1 --save_steps 2 --bf16 --learning_rate 3e-2"
)


def test_a_run_on_two_ranks_under_zero_3(user, tmp_path, out, merged):
    """Resumed to the bit, right after a merge that is not saved yet, and in mid-cycle; on
    one rank too. Its exports are the live model, and each cycle of the ledger has the
    sides of the base."""
    summary = run(2, user.flags(out, MERGING))
    assert (summary["merges"], summary["base_bytes_gathered"]) == (2, 0)
    before = summary["perplexity_before"]["held"]
    assert summary["perplexity_after"]["held"] < 0.99 * before, "it learns"
    resumed = tmp_path / "resumed"
    stop_and_resume(2, user.flags(resumed, MERGING), 3, 5)
    assert_same_run(resumed, out)

    assert export_merged(out, merged, verify=True).cycles == 2
    exported = AutoModelForCausalLM.from_pretrained(merged)
    live = load_adapter(user.model, out)
    ids = tokens(3)
    torch.testing.assert_close(exported(ids).logits, live(ids).logits, atol=0.1, rtol=0)
    values = load_file(out / "checkpoints/latest/adapter.safetensors")
    base = BaseCheckpoint.open(user.model)
    ledger = Ledger.open(out / "ledger")
    for name, layer in mora_layers(live).items():
        weight = base.read(f"{name}.weight").double()
        r_hat = layer.spec.r_hat
        sides = values[f"{name}.mora_matrix"][:, r_hat:]
        assert torch.equal(sides, layer.fixed_of(weight).bfloat16().float())
        for spec, value in ledger.mora_matrices_of(name):
            assert torch.equal(value[:, r_hat:], sides)
            weight += delta_by_hand(spec, value.double())
        torch.testing.assert_close(layer.weight.double(), weight, atol=4e-3, rtol=8e-3)

    export_peft(out, tmp_path / "lora")
    shapes = load_file(tmp_path / "lora/adapter_model.safetensors")
    down = shapes["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert len(down) == min(3 * layer.spec.r_hat, 32), "of three cycles"


@pytest.mark.heavy(seconds=90)
@pytest.mark.parametrize("more", ["", "--base_bits 8", "--base_bits 4"])
def test_a_resumed_run_on_another_number_of_ranks(user, tmp_path, more):
    """Close to the uninterrupted one, as sums over ranks round differently."""
    plain = MERGING.replace("--bf16", "") + f" {more}"
    reference = tmp_path / "reference"
    out = tmp_path / "out"
    halves = "--per_device_train_batch_size 1"
    run(1, user.flags(reference, plain))
    run_ranks(1, interrupted_job, user.flags(out, plain), 5)
    resume = "--resume_from_checkpoint auto"
    run(2, user.flags(out, plain, halves, resume))
    assert_close_runs(out, reference)
    again = tmp_path / "again"
    stop_and_resume(1, user.flags(again, plain), 4, 7)
    assert_same_run(again, reference)
    export_merged(out, tmp_path / "merged", verify=True)
    export_merged(out, tmp_path / "half", delta_scale=0.5)


# -- what it does not support ----------------------------------------------------------

REFUSED = """
--tensor_parallel_size 2 | --tensor_parallel_size 2: --adapter subspace does not support tensor parallelism
--target_modules experts | --target_modules names experts: --adapter subspace does not support experts
--optimizer muon | --optimizer muon: --adapter subspace does not support Muon
--operator share | --operator is not for subspace: leave it out
"""


@pytest.mark.parametrize("flags, message", rows(REFUSED))
def test_a_setting_that_it_does_not_support(user, out, flags, message):
    with user_error(message):
        validate(parse(user.flags(out, "--adapter subspace", flags)))
