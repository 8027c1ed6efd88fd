"""The collectives that ZeRO-1 and ZeRO-2 take on many ranks: the same bits and bytes as those
on few. Those of ZeRO-3: tests/engine/test_module_hooks.py.
"""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from mora_ds.engine import ds_config as ds_config_module
from mora_ds.engine.initialize import initialize
from mora_ds.engine.traffic import CollectiveCounter
from tests.helpers.engines import ds_config, trained_values
from tests.helpers.models import micro_step, model_with_mora, tokens
from tests.helpers.pool import run_pooled
from tests.helpers.resume import assert_same_tensors

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = {
    "stage 2, bf16": (2, BF16, {}),
    "stage 2, fp16": (2, FP16, {}),
    "stage 2, fp32": (2, {}, {}),
    "stage 2, several buckets": (2, BF16, {"reduce_bucket_size": 200}),
    "stage 2, offload": (2, BF16, OFFLOAD),
    "stage 1, fp32": (1, {}, {}),
}


def trained(case):
    """Losses, gradient norms and matrices of 3 steps of 2 micro-batches; the bytes of all
    all-reduces, and how often a bucket was cut into slices.
    """
    stage, precision, settings = CASES[case]
    torch.manual_seed(0)
    config = ds_config(stage, 2, 2, **precision)
    config["zero_optimization"].update(settings)
    engine = initialize(model=model_with_mora("llama"), config=config)[0]
    curve = []
    cut = DeepSpeedZeroOptimizer.allreduce_and_scatter
    with (
        CollectiveCounter().counting() as counter,
        patch.object(
            DeepSpeedZeroOptimizer,
            "allreduce_and_scatter",
            autospec=True,
            side_effect=cut,
        ) as cuts,
    ):
        for step in range(6):
            loss = micro_step(engine, tokens(2, seed=10 * step + dist.get_rank()))
            curve.append((loss.item(), engine.get_global_grad_norm()))
    matrices = trained_values(engine)
    return curve, matrices, counter.bytes["all_reduce"], cuts.call_count


def with_the_collectives_for_few_and_for_many(cases):
    """(bytes, slicings) of each case by both."""
    counts = []
    for case in cases:
        curve, matrices, sliced_bytes, slicings = trained(case)
        with patch.object(ds_config_module, "MANY_RANKS", 0):
            actual, actual_matrices, full_bytes, full_slicings = trained(case)
        assert actual == curve, case
        assert curve[0] != curve[-1], case
        assert_same_tensors(actual_matrices, matrices, case)
        counts.append(((sliced_bytes, slicings), (full_bytes, full_slicings)))
    return counts


@pytest.mark.parametrize("ranks", [2, 3])
def test_full_buckets_give_the_same_bits_for_the_same_bytes(ranks):
    """A third of a gradient is rounded: it is divided before the sum in both."""
    for counts in run_pooled(
        ranks, with_the_collectives_for_few_and_for_many, list(CASES)
    ):
        for case, (sliced, full) in zip(CASES, counts, strict=True):
            assert sliced[0] == full[0] > 0, case
            assert sliced[1] > 0, case
            assert full[1] == 0, case
