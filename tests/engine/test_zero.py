"""ZeRO communicates the MoRA matrices and nothing of the base; how these matrices are
set and reset."""

import math

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from mora_ds.adapters.inject import frozen_buffers, mora_layers
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.engine.traffic import CollectiveCounter
from tests.helpers.engines import CountedBelow, ds_config
from tests.helpers.models import adapted_model, micro_step, tokens
from tests.helpers.pool import run_pooled
from tests.helpers.tables import parsed, rows


def count_bytes(accumulation, zero_settings):
    """Everything torch.distributed itself carries while one step runs, counted below
    DeepSpeed.
    """
    model = adapted_model()
    config = ds_config(3, 3, accumulation)
    config["zero_optimization"].update(zero_settings)
    engine, *_ = initialize(model=model, config=config)
    counter = CollectiveCounter(frozen_buffers(model).values())
    seen = {}
    with counter.counting(), CountedBelow(seen):
        for step in range(3):
            counter.reset()
            seen.clear()
            for _ in range(accumulation):
                micro_step(engine, tokens(3, seed=step))
        gathered = counter.gathered_bytes
    trainable = sum(layer.mora_matrix.ds_numel for layer in mora_layers(model).values())
    padded = sum(
        -(-layer.mora_matrix.ds_numel // 2) * 2 for layer in mora_layers(model).values()
    )
    base = sum(
        {t.data_ptr(): t.numel() for t in frozen_buffers(model).values()}.values()
    )
    return {
        "gathered": gathered,
        "seen": dict(seen),
        "trainable": trainable,
        "padded": padded,
        "base": base,
        "base_bytes": counter.base_bytes,
    }


PASSES = """
# gathered in forward, kept for backward; once a micro-batch
1 | 1 | {}
3 | 3 | {}
# in forward and in backward
2 | 1 | {stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0}
# kept gathered, refreshed once a step
1 | 1 | {stage3_param_persistence_threshold: 1000000}
1 | 3 | {stage3_param_persistence_threshold: 1000000}
"""


@pytest.mark.parametrize("row", rows(PASSES), ids=" ".join)
def test_collectives_carry_only_mora_matrices(row):
    passes, accumulation, settings = map(parsed, row)
    for result in run_pooled(2, count_bytes, accumulation, settings):
        gathers = sum(
            count for name, count in result["seen"].items() if "gather" in name
        )
        assert result["gathered"] == gathers == passes * 4 * result["padded"]
        everything = sum(result["seen"].values())
        reductions = accumulation * 4 * result["padded"]
        assert (
            everything <= gathers + reductions + 512 * accumulation
        )  # + norms and flags
        assert result["base_bytes"] == 0


def padding_is_finite():
    """Whether all elements of this process's fp32 master weights are finite, although
    memory holds NaN before it is written to."""
    torch.use_deterministic_algorithms(True)
    try:
        engine, *_ = initialize(model=adapted_model(), config=ds_config(3, 2, 1))
    finally:
        torch.use_deterministic_algorithms(False)
    return all(flat.master.isfinite().all() for flat in zero.view_of(engine).flats())


def test_what_fills_a_master_up_is_zero():
    assert run_pooled(3, padding_is_finite) == [True] * 3


def set_and_reset():
    """The first matrix as forward reads it, after it is set to 1 and after a reset."""
    model = adapted_model().to(torch.bfloat16)
    config = ds_config(
        1, 2, 1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}
    )
    engine, *_ = initialize(model=model, config=config)
    assert isinstance(engine.optimizer, BF16_Optimizer), "else this tests another one"
    assert math.isnan(zero.gradient_norm(engine)), "before the first step"
    mora_matrices = [layer.mora_matrix for layer in mora_layers(model).values()]
    zero.set_fp32(engine, {mora_matrices[0]: torch.ones(mora_matrices[0].shape)})
    was_set = mora_matrices[0].float().unique().tolist()
    zero.reset_group(engine, 0)
    return was_set + mora_matrices[0].float().unique().tolist()


def test_a_matrix_in_bf16_with_gradients_in_fp32_is_set_and_reset_as_forward_reads_it():
    assert run_pooled(2, set_and_reset) == [[1.0, 0.0]] * 2
