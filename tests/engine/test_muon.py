"""Muon on the MoRA matrices, AdamW on the other parameters: sharded = one plain process,
merged, resumed, refused.
"""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from mora_ds.adapters.config import LoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.mora import delta_weight
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.engine.muon import clip_factor
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.engine.zero import view_of
from tests.helpers.engines import EPSILON, ds_config, merge_by_hand, state_tensors
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import rows, run, validation_errors_of
from tests.helpers.models import (
    adapted_model,
    causal_loss,
    micro_step,
    tiny_model,
    tokens,
)
from tests.helpers.operators import random
from tests.helpers.pool import run_pooled
from tests.helpers.resume import assert_same_run, interrupted_job
from tests.helpers.tables import parsed

ROWS = 6
STEPS = 3
ACCUMULATION = 2
CLIP = 0.05
RATE = 0.05
OTHERS_RATE = 0.01
BETA = 0.9
DECAY = 0.1
MUON = {
    "type": "Muon",
    "params": {
        "lr": OTHERS_RATE,
        "muon_lr": RATE,
        "momentum": BETA,
        "betas": [0.9, 0.999],
        "eps": EPSILON,
        "weight_decay": DECAY,
    },
}


def muon_config(stage, micro, accumulation=ACCUMULATION, **changes):
    types = {"grad_accum_dtype": "fp32"}
    return ds_config(
        stage,
        micro,
        accumulation,
        optimizer=MUON,
        gradient_clipping=CLIP,
        data_types=types,
        **changes,
    )


def small_model(lora=False):
    if not lora:
        return adapted_model(train_norms=True, train_embeddings=True, train_head=True)
    model = tiny_model()
    inject(
        model,
        LoRAConfig(rank=4, train_norms=True, train_embeddings=True, train_head=True),
    )
    for index, layer in enumerate(mora_layers(model).values()):
        layer.adapter_weight.data = (
            0.1 * random(*layer.adapter_weight.shape, seed=index).float()
        )
    return model


def mora_matrices_of(model):
    return [layer.adapter_weight for layer in mora_layers(model).values()]


def others_of(model):
    mora_matrices = {id(mora_matrix) for mora_matrix in mora_matrices_of(model)}
    return [
        parameter
        for parameter in model.parameters()
        if id(parameter) not in mora_matrices
    ]


# -- one process -----------------------------------------------------------------------


def orthogonal(matrix):
    """Five Newton-Schulz steps with the coefficients that Muon is known by; towards U V^T
    of the matrix's SVD.
    """
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def orthogonal_factors(factors, d_in):
    """The factors of [A | B^T]: A and B separately; Muon multiplies the update of a
    tall matrix such as B."""
    down = orthogonal(factors[:, :d_in])
    up = orthogonal(factors[:, d_in:])
    return torch.cat([down, up * (up.shape[1] / len(up)) ** 0.5], dim=1)


def without_half_precision():
    """DeepSpeed iterates in fp16 where the machine has it: 0.05 learning rates of rounding
    in three steps, in which a real difference might hide. In fp32 equality can be asked
    for."""
    from deepspeed.runtime.zero.muon import original_muon

    original_muon.ns_compute_dtype = lambda method="gram": torch.float32


def plain_run(merge_at=None, lora=False):
    """No DeepSpeed, the complete global batch at once: gradient clipped, then Muon and
    AdamW.
    """
    model = small_model(lora)
    layers = list(mora_layers(model).values())
    mora_matrices = mora_matrices_of(model)
    adam_parameters = others_of(model)
    momentum = [torch.zeros_like(mora_matrix) for mora_matrix in mora_matrices]
    adam = torch.optim.AdamW(
        adam_parameters, lr=OTHERS_RATE, eps=EPSILON, weight_decay=DECAY
    )
    norms = []
    for step in range(STEPS):
        model.zero_grad()
        causal_loss(model, tokens(ROWS * ACCUMULATION, seed=step)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        adam.step()
        with torch.no_grad():
            for layer, mora_matrix, moving in zip(
                layers, mora_matrices, momentum, strict=True
            ):
                moving.lerp_(mora_matrix.grad, 1 - BETA)
                blended = mora_matrix.grad.lerp(moving, BETA)
                if lora:
                    update = orthogonal_factors(blended, layer.spec.d_in)
                else:
                    update = orthogonal(blended)
                mora_matrix.mul_(1 - RATE * DECAY).add_(update, alpha=-RATE)
        if step + 1 == merge_at:
            for layer, moving in zip(
                mora_layers(model).values(), momentum, strict=True
            ):
                layer.weight += delta_weight(layer.spec, layer.mora_matrix.data)
                layer.mora_matrix.data.zero_()
                moving.zero_()
    return {
        "mora_matrices": mora_matrices,
        "others": adam_parameters,
        "norms": norms,
        "momentum": _norm(momentum),
    }


def _norm(tensors):
    return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5


# -- several ---------------------------------------------------------------------------


def train(engine, merge_at=None):
    """Gradient norms of the steps."""
    shape = (ACCUMULATION, dist.get_world_size(), -1)
    norms = []
    for step in range(STEPS):
        batch = tokens(ROWS * ACCUMULATION, seed=step).unflatten(0, shape)
        for micro in batch:
            micro_step(engine, micro[dist.get_rank()])
        norms.append(zero.gradient_norm(engine))
        if step + 1 == merge_at:
            merge_by_hand(engine)
    return norms


PRECISIONS = parsed("""
fp32: {}
bf16: {bf16: {enabled: true}}
fp16: {fp16: {enabled: true, initial_scale_power: 8}}
""")


def sharded_run(stage, merge_at=None, precision="fp32", lora=False):
    without_half_precision()
    world = dist.get_world_size()
    config = muon_config(stage, ROWS // world, **PRECISIONS[precision])
    model = small_model(lora)
    engine, *_ = initialize(model=model, config=config)
    norms = train(engine, merge_at)
    state = [
        (key, value.dtype, value.float()) for key, value in state_tensors(engine, 0)
    ]
    return {
        "optimizer": type(engine.optimizer).__name__,
        "muon": [group["use_muon"] for group in engine.optimizer.param_groups],
        "mora_matrices": [
            zero.full_fp32(mora_matrix) for mora_matrix in mora_matrices_of(model)
        ],
        "others": [zero.full_fp32(parameter) for parameter in others_of(model)],
        "norms": norms,
        "state": {(key, dtype) for key, dtype, _ in state},
        "momentum": _norm(
            [value for key, _, value in state if key == "momentum_buffer"]
        ),
        "frames": sum(counters["frames"].values()),
    }


def worst(tensors, expected, unit):
    """The largest difference, in learning rates."""
    pairs = zip(tensors, expected, strict=True)
    return max((one - another).abs().max().item() for one, another in pairs) / unit


def assert_follows(ranks, expected, tolerance):
    """A step moves a matrix by one learning rate: an update that is clipped itself, or
    orthogonalized in parts, is off by more than that."""
    for rank in ranks:
        assert rank["muon"] == [True, False]
        assert worst(rank["mora_matrices"], expected["mora_matrices"], RATE) < tolerance
        # half: AdamW of small gradients
        assert worst(rank["others"], expected["others"], OTHERS_RATE) < 3 * tolerance
        assert rank["norms"] == pytest.approx(expected["norms"], rel=tolerance)
        for one, another in zip(
            rank["mora_matrices"], ranks[0]["mora_matrices"], strict=True
        ):
            assert torch.equal(one, another), "ranks have moved apart"
        assert rank["state"] == {("momentum_buffer", torch.float32)}
        assert rank["frames"] == 0, "something was compiled"


@pytest.mark.parametrize("world, stage", [(2, 3), (3, 3), (2, 1)])
def test_mora_matrices_and_other_parameters_follow_one_process(world, stage):
    """Clipped, accumulated, decayed."""
    expected = plain_run()
    assert min(expected["norms"]) > 2 * CLIP
    assert_follows(run_ranks(world, sharded_run, stage), expected, 2e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_factors_are_orthogonalized_separately(stage):
    ranks = run_ranks(2, sharded_run, stage, None, "fp32", True)
    assert_follows(ranks, plain_run(lora=True), 2e-3)


def test_where_factors_would_be_taken_for_one_matrix_they_are_refused():
    config = muon_config(1, ROWS, bf16={"enabled": True})
    with user_error("in bf16 needs ZeRO stage 2 or 3"):
        initialize(model=small_model(lora=True), config=config)
    aligned = muon_config(2, ROWS)
    aligned["zero_optimization"]["parameter_alignment"] = True
    with user_error(r"leave zero_optimization\.parameter_alignment out"):
        initialize(model=small_model(lora=True), config=aligned)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_merge_zeroes_the_momentum(stage):
    assert_follows(run_ranks(2, sharded_run, stage, 2), plain_run(merge_at=2), 2e-3)


@pytest.mark.parametrize("stage, precision", [(2, "bf16"), (3, "fp16")])
def test_low_precision_keeps_an_unscaled_momentum_in_fp32(stage, precision):
    ranks = run_ranks(2, sharded_run, stage, None, precision)
    expected = plain_run()
    assert_follows(ranks, expected, 0.4)
    # Shards; what is split lies on both. With the loss scale in it, it would be 256 times
    # as large
    together = sum(rank["momentum"] ** 2 for rank in ranks) ** 0.5
    assert 0.9 < together / expected["momentum"] < 1.5


def test_gradients_are_clipped_where_there_is_a_limit():
    norms = [torch.tensor(3.0), torch.tensor(4.0)]  # of groups, with the loss scale
    assert clip_factor(norms, 2.0, 0.5) == pytest.approx(0.2, rel=1e-6)
    assert clip_factor(norms, 2.0, 5.0) == clip_factor(norms, 2.0, 0.0) == 1.0
    assert clip_factor([torch.tensor(math.inf)], 2.0, 0.5) is None


def momentum_over_a_dropped_step():
    """The optimizer's state before and after a step in which a matrix has a gradient that
    is not finite."""
    model = small_model()
    engine, *_ = initialize(model=model, config=muon_config(3, ROWS // 2, 1))
    factors = iter((1.0, math.nan))
    mora_matrices_of(model)[0].register_hook(lambda gradient: gradient * next(factors))
    states = []
    for _ in range(2):
        micro_step(engine, tokens(ROWS // 2))
        states.append([value.clone() for _, value in state_tensors(engine, 0)])
    return states


def test_a_step_that_is_dropped_leaves_the_momentum_as_it_was():
    """The momentum of the other matrices too, which DeepSpeed itself would change at
    stage 3."""
    for before, after in run_pooled(2, momentum_over_a_dropped_step):
        assert before
        assert all(map(torch.equal, before, after))


def learning_rates(names):
    engine, *_ = initialize(model=small_model(), config=muon_config(3, 2))
    zero.set_learning_rate(engine, RATE / 4, OTHERS_RATE / RATE)
    return [
        [group[name] for group in engine.optimizer.param_groups if name in group]
        for name in names
    ]


def test_schedule_keeps_the_ratio_of_the_two_learning_rates():
    (settings,) = run_pooled(
        1, learning_rates, ("lr", "momentum", "eps", "weight_decay")
    )
    assert settings == [
        pytest.approx([RATE / 4, OTHERS_RATE / 4]),
        [BETA],
        [EPSILON],
        [DECAY, DECAY],
    ]


def groups_of(family):
    """Elements of each parameter group, as the optimizer has them and as they should be."""
    model = adapted_model(family, train_embeddings=True, train_head=True)
    expected = [mora_matrices_of(model), others_of(model)]
    engine, *_ = initialize(model=model, config=muon_config(1, 2))
    assert engine.optimizer_name() == "muon"
    return numels_of(view_of(engine).groups()), numels_of(expected)


def numels_of(groups):
    return [sum(parameter.numel() for parameter in group) for group in groups]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_mora_matrices_are_group_0_and_all_of_muon_whatever_the_names(family):
    """If names decided, GPT-2's embeddings would get Muon."""
    ((numels, expected),) = run_pooled(1, groups_of, family)
    assert numels == expected


# -- the main job ----------------------------------------------------------------------


JOB = (
    "--optimizer muon --learning_rate 0.05 --max_steps 6 --merge_every 2 --restart_warmup_steps 1 "
    "--save_steps 3 --train_norms true"
)


def test_the_job_learns_merges_and_resumes_bit_for_bit(user, tmp_path, out):
    reference = tmp_path / "reference"
    run(2, user.flags(reference, JOB))
    run_ranks(2, interrupted_job, user.flags(out, JOB), 5)
    run(2, user.flags(out, JOB, "--resume_from_checkpoint latest"))
    assert_same_run(out, reference)
    history = rows(out)
    held = [
        row["eval_perplexity"]["held"] for row in history if "eval_perplexity" in row
    ]
    assert held[-1] < 0.98 * held[0]
    assert max(row.get("learning_rate", 0) for row in history) <= 0.05
    flags = user.flags(out, JOB, "--resume_from_checkpoint latest --optimizer adamw")
    assert "--optimizer" in validation_errors_of(flags, ranks=2)


def carried():
    """Bytes that one optimizer step at stage 3 gathers, and those of the MoRA matrices."""
    model = adapted_model()
    config = muon_config(3, 3, 1)
    engine, *_ = initialize(model=model, config=config)
    counter = CollectiveCounter()
    with counter.counting():
        for step in range(2):
            counter.reset()
            micro_step(engine, tokens(3, seed=step))
    padded = sum(
        -(-mora_matrix.ds_numel // 2) * 2 for mora_matrix in mora_matrices_of(model)
    )
    return {
        "gathered": counter.gathered_bytes,
        "all": sum(counter.bytes.values()),
        "mora_matrices": 4 * padded,
    }


def test_a_step_gathers_the_mora_matrices_five_times():
    """Once for forward and backward, as ever; then gradients and momentum before
    Newton-Schulz, both again after.
    """
    for traffic in run_pooled(2, carried):
        assert (
            4.9 < traffic["gathered"] / traffic["mora_matrices"] < 5.5
        )  # padding apart
        # The gradients' reduction
        assert (
            traffic["all"] - traffic["gathered"]
            <= 1.1 * traffic["mora_matrices"] + 1024
        )
