"""Low precision at t = 2 follows one rank in the same precision; what every rank holds
stays the same everywhere.
"""

from pathlib import Path

import pytest
import torch.distributed as dist

from mora_ds.adapters.inject import frozen_buffers
from mora_ds.common.tensor_files import tensor_checksum
from mora_ds.engine import zero
from mora_ds.parallel.topology import shard_info
from mora_ds.remora.ledger import Ledger
from mora_ds.remora.merge import ReMoRA
from tests.helpers.engines import ACCUMULATION, CLIP, ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.models import micro_step
from tests.helpers.tables import parsed
from tests.helpers.tensor_parallel import (
    BATCHES,
    base_in_memory,
    batches,
    config_of,
    start,
)

STEPS = 20
COMPARED_EVERY = 5
LEARNING_RATE = 2e-3
PRECISIONS = parsed("""
float32: {}
bfloat16: {bf16: {enabled: true}}
float16: {fp16: {enabled: true, initial_scale_power: 8}}
""")
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}
"""Tolerance of the loss: half a unit in the last place of the dtype; in fp32 that of
the other tests."""
EVERYTHING = {"train_norms": True, "train_embeddings": True, "train_head": True}
CASES = [
    # q_norm and k_norm see a rank's heads alone
    {"family": "qwen3", "operator": "share", **EVERYTHING},
    # Only the MoRA matrices are split
    {"family": "gpt2", "operator": "rotate", **EVERYTHING},
]


def trained(case, dtypes, degree, folder):
    return {
        dtype: trained_in(dtype, case, degree, Path(folder) / dtype) for dtype in dtypes
    }


def trained_in(dtype, case, degree, folder):
    """Losses, norms, now and then the checksums of what all ranks hold, and in the end
    those of the merged base.
    """
    optimizer = ds_config(3, 1)["optimizer"]
    optimizer["params"]["lr"] = LEARNING_RATE
    engine, replica, replicas = start(
        case, degree, more={**PRECISIONS[dtype], "optimizer": optimizer}
    )
    micro = BATCHES // replicas
    results = {"losses": [], "norms": [], "replicated": []}
    for step in range(STEPS):
        total = 0.0
        for ids in batches(step % 3):
            loss = micro_step(engine, ids[replica * micro :][:micro])
            total += loss.item() / ACCUMULATION
        results["losses"].append(total)
        results["norms"].append(zero.gradient_norm(engine))
        if step == 0 or (step + 1) % COMPARED_EVERY == 0:
            results["replicated"].append(replicated(engine))
    if dist.get_rank() == 0:
        Ledger.create(folder, "0" * 64)
    dist.barrier()
    ReMoRA(
        engine, config_of(case), Ledger.open(folder), *base_in_memory(engine.module)
    ).merge(STEPS)
    results["base"] = {
        name: tensor_checksum(tensor)
        for name, tensor in frozen_buffers(engine.module).items()
    }
    return results


def replicated(engine):
    """Checksums of the fp32 master weights that are the same on all ranks of a group."""
    parameters = {
        name: p for name, p in engine.module.named_parameters() if shard_info(p) is None
    }
    master_weights = {
        name: zero.full_fp32(parameter) for name, parameter in parameters.items()
    }
    return {
        name: tensor_checksum(master.contiguous())
        for name, master in master_weights.items()
    }


def test_it_follows_one_rank_and_ranks_do_not_drift(tmp_path):
    compare(CASES[0], ["bfloat16"], tmp_path)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["family"])
def test_every_precision_follows_one_rank(case, tmp_path):
    compare(case, list(PRECISIONS), tmp_path)


def compare(case, dtypes, folder):
    alone, *_ = run_ranks(1, trained, case, dtypes, 1, str(folder / "alone"))
    ranks = run_ranks(2, trained, case, dtypes, 2, str(folder / "split"))
    for dtype, expected in alone.items():
        first, *remaining = (rank[dtype] for rank in ranks)
        assert max(first["norms"]) > CLIP, "the gradient was clipped"
        assert len(first["replicated"][0]) > 4
        assert first["replicated"][0] != first["replicated"][-1]
        for result in remaining:
            assert result == first, "ranks drifted apart"
        assert first["losses"][-1] < first["losses"][0] - 0.1, "it learns"
        error = max(
            abs(mine - theirs) / theirs
            for mine, theirs in zip(first["losses"], expected["losses"], strict=True)
        )
        assert error <= TOLERANCE[dtype], (dtype, error)


# -- by construction -------------------------------------------------------------------


def with_noise():
    """Checksums of what all ranks hold after each of three steps; the second rank's
    gradients are a little off.
    """
    engine, *_ = start(CASES[1], 2)

    def disturb(gradient):
        return gradient * (1 + 1e-3 * dist.get_rank())

    engine.module.lm_head.register_forward_hook(
        lambda module, args, out: out.register_hook(disturb) and None
    )
    checksums = []
    for step in range(3):
        for ids in batches(step):
            micro_step(engine, ids)
        checksums.append(replicated(engine))
    return checksums


def test_ranks_stay_equal_even_where_their_gradients_are_not():
    first, second = run_ranks(2, with_noise)
    assert first == second
    assert first[0] != first[1]
