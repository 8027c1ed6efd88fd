"""The adapter `subspace`: its update, its sides, and runs that merge, resume and export."""

import math

import pytest
import torch
from safetensors.torch import load_file

from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.config.arguments import from_flat, parse
from mora_ds.config.validate import validate
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import Ledger
from mora_ds.research.gradient_sides import gradient_sides, leading_rows
from mora_ds.research.subspace import SubspaceConfig, SubspaceLinear, SubspaceSpec
from mora_ds.runtime.ranks import Ranks
from tests.helpers.errors import run_error, user_error
from tests.helpers.exports import exported_and_live
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import research, run
from tests.helpers.models import causal_loss, enable_checkpointing, tiny_model, tokens
from tests.helpers.operators import (
    assert_same_bits_for_every_number_of_threads,
    random,
)
from tests.helpers.resume import (
    MERGING_BF16,
    assert_close_runs,
    assert_same_run,
    interrupted_job,
    stop_and_resume,
)
from tests.helpers.tables import rows

SPEC = SubspaceSpec(11, 7, 3)
ALONE = Ranks(0, 1, 0, None, timeout_s=60)


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


# -- sides from the gradient -----------------------------------------------------------


WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
"""A model for which more directions than are needed are fewer than all."""


@pytest.mark.parametrize(
    "family, checkpointing, sizes",
    [("gpt2", False, {}), ("llama", True, {}), ("llama", False, WIDE)],
)
def test_sides_of_the_mean_gradient(family, checkpointing, sizes):
    """They hold what the leading singular vectors of the gradient do, and no trained
    tensor gets one."""
    batches = [tokens(8, length=64, seed=seed) for seed in range(3)]
    plain = tiny_model(family, **sizes)
    for ids in batches:
        causal_loss(plain, ids).backward()
    model = tiny_model(family, **sizes)
    inject(model, SubspaceConfig(rank=1, r_hat_multiple=2, train_norms=True))
    for layer in mora_layers(model).values():
        layer.fixed.zero_()
    if checkpointing:
        enable_checkpointing(model.train())

    def losses():
        return (causal_loss(model, ids) for ids in batches)

    sides = gradient_sides(model, losses, seed=1, ranks=ALONE)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    for name, layer in mora_layers(model).items():
        gradient = plain.get_parameter(f"{name}.weight").grad
        gradient = gradient.T if layer.transposed else gradient
        right, left = sides[name].split((layer.in_features, layer.out_features), dim=1)
        for rows_of_side in (right, left):
            identity = torch.eye(layer.spec.r_hat)
            torch.testing.assert_close(rows_of_side @ rows_of_side.T, identity)
        held = (left @ gradient @ right.T).square().sum()
        most = torch.linalg.svdvals(gradient)[: layer.spec.r_hat].square().sum()
        assert 0.95 < held / most < 1.001, name
        layer.fixed.fill_(math.nan)
    with run_error("0.*the gradient for research.sides is NaN or infinite"):
        gradient_sides(model, losses, seed=1, ranks=ALONE)


def test_sides_do_not_jump_where_singular_values_are_close():
    matrix = random(8, 8, seed=1)
    near = random(3, 8, seed=2)
    left, _, right = torch.linalg.svd(matrix)
    values = torch.tensor([2.0, 2, 2, 1, 0.5, 0, 0, 0]).double()
    sides = [
        leading_rows(left @ (values + 1e-6 * noise).diag() @ right, near)
        for noise in (random(8, seed=3), random(8, seed=4))
    ]
    torch.testing.assert_close(*sides, atol=1e-4, rtol=0)


# -- runs ------------------------------------------------------------------------------

MERGING = f"--adapter subspace --mora_rank 2 --r_hat_multiple 2 {MERGING_BF16}"


def flags_of(user, sides, out, *more):
    return research(user.flags(out, *more), out.parent, sides=sides)


@pytest.mark.parametrize(
    "sides", ["gradient", pytest.param("weight", marks=pytest.mark.heavy(seconds=20))]
)
def test_a_run_on_two_ranks_under_zero_3(user, tmp_path, out, merged, sides):
    """Resumed to the bit, right after a merge that is not saved yet, and in mid-cycle.
    Its exports are the live model. Each cycle of the ledger has the sides of the base, or
    its own ones."""
    summary = run(2, flags_of(user, sides, out, MERGING))
    resumed = tmp_path / "resumed"
    stop_and_resume(2, flags_of(user, sides, resumed, MERGING), 3, 5)
    assert_same_run(resumed, out)

    _, live = exported_and_live(user, out, merged, summary)
    values = load_file(out / "checkpoints/latest/adapter.safetensors")
    base = BaseCheckpoint.open(user.model)
    ledger = Ledger.open(out / "ledger")
    for name, layer in mora_layers(live).items():
        weight = base.read(f"{name}.weight").double()
        r_hat = layer.spec.r_hat
        now = values[f"{name}.mora_matrix"][:, r_hat:]
        of_weight = layer.fixed_of(weight).bfloat16().float()
        assert torch.equal(now, of_weight) == (sides == "weight")
        for spec, value in ledger.mora_matrices_of(name):
            assert torch.equal(value[:, r_hat:], now) == (sides == "weight")
            right = value[:, r_hat : r_hat + spec.d_in]
            identity = torch.eye(r_hat)
            torch.testing.assert_close(right @ right.T, identity, atol=0.01, rtol=0)
            weight += delta_by_hand(spec, value.double())
        torch.testing.assert_close(layer.weight.double(), weight, atol=4e-3, rtol=8e-3)

    export_peft(out, tmp_path / "lora")
    shapes = load_file(tmp_path / "lora/adapter_model.safetensors")
    down = shapes["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]
    assert len(down) == min(3 * layer.spec.r_hat, 32), "of three cycles"


@pytest.mark.heavy(seconds=120)
@pytest.mark.parametrize(
    "sides, more",
    [
        ("weight", ""),
        ("weight", "--base_bits 8"),
        ("gradient", "--gradient_checkpointing --train_norms"),
        ("gradient", "--base_bits 4 --base_device host"),
    ],
)
def test_a_resumed_run_on_another_number_of_ranks(user, tmp_path, sides, more):
    """Close to the uninterrupted one, as sums over ranks round differently."""
    plain = MERGING.replace("--bf16", "") + f" {more}"
    reference = tmp_path / "reference"
    out = tmp_path / "out"
    halves = "--per_device_train_batch_size 1"
    run(1, flags_of(user, sides, reference, plain))
    run_ranks(1, interrupted_job, flags_of(user, sides, out, plain), 5)
    resume = "--resume_from_checkpoint auto"
    run(2, flags_of(user, sides, out, plain, halves, resume))
    # Where singular values of a gradient are close, rounding turns its sides further
    assert_close_runs(out, reference, atol=0.02 if sides == "gradient" else 1e-4)
    again = tmp_path / "again"
    stop_and_resume(1, flags_of(user, sides, again, plain), 4, 7)
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


@pytest.mark.parametrize(
    "adapter, sides, message",
    rows("""
lora | gradient | research.sides is for --adapter subspace: leave it out
subspace | gradeint | unknown research.sides 'gradeint'; known: weight, gradient. Did you mean 'gradient'?
"""),
)
def test_sides_that_there_are_not(adapter, sides, message):
    settings = {"adapter": adapter, "research": {"sides": sides}}
    with user_error(message):
        validate(from_flat(settings))
