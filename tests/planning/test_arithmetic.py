"""The arithmetic of plans, with figures counted by hand: bytes under every ZeRO stage."""

from dataclasses import replace

import pytest

from mora_ds.planning.memory import (
    Gathers,
    Trained,
    all_gather_volume,
    gathers,
    rank_memory,
    reduced_bytes,
)
from mora_ds.planning.step import StepMemory
from tests.helpers.tables import each_row, parsed

STEP = StepMemory(saved=300, peak=500, tables=20)
GATHERED = Gathers(200, 90, 40)


def trained(stage, **changes):
    """Two matrices and a norm on four ranks, 169 elements in bf16; a shard has 43, and
    under ZeRO-3, padded, 44.
    """
    zero = {
        "stage": stage,
        "reduce_bucket_size": 50,
        "stage3_param_persistence_threshold": 7,
        **changes.pop("zero", {}),
    }
    config = {"zero_optimization": zero}
    return replace(Trained((101, 61, 7), 80, 162, 4, 2, config), **changes)


@pytest.mark.parametrize(
    "stage, weights, moments, gradients",
    [(1, 338, 344, 676), (2, 338, 344, 172), (3, 88, 352, 176)],
)
def test_what_a_rank_holds_at_each_stage(stage, weights, moments, gradients):
    gathered = GATHERED if stage == 3 else Gathers()
    memory = rank_memory(1000, 70, STEP, trained(stage), gathered)
    shard = 44 if stage == 3 else 43
    stays = 14 if stage == 3 else 0
    assert memory.trained == weights
    assert memory.master_weights == 4 * shard
    assert memory.moments == moments
    assert memory.gradients == gradients
    assert memory.bucket == 100
    in_engine = weights + 4 * shard + moments + gradients + 100
    assert memory.static == 1000 + 20 + in_engine
    assert memory.activations == 300
    assert memory.host_save == 4 * 169
    assert memory.host_optimizer == 0
    assert memory.optimizer_step == 2 * 4 * shard
    assert (memory.merge, memory.save) == (70 + 2 * 404 + stays, 2 * 404 + stays)
    assert memory.gathered == (2 * (90 + 7) if stage == 3 else 0)
    again = 2 * 40 if stage == 3 else 0  # backward gathers again, into an output buffer
    assert memory.forward_backward == memory.gathered + again + 500
    assert memory.peak == memory.static + max(
        memory.forward_backward, memory.merge, memory.optimizer_step
    )


def test_where_else_states_of_the_optimizer_are():
    offloaded = trained(2, zero={"offload_optimizer": {"device": "cpu"}})
    memory = rank_memory(0, 0, STEP, offloaded, GATHERED)
    for name in ("master_weights", "moments", "gradients", "optimizer_step", "merge"):
        assert getattr(memory, name) == 0
    assert memory.host_optimizer == 172 + 344 + 172
    on_cpu = rank_memory(0, 0, STEP, trained(2, on_cpu=True), GATHERED)
    assert on_cpu.optimizer_step == 3 * 4 * 43


def test_muon_has_one_moment_of_a_matrix_and_gathers_some_at_a_time():
    memory = rank_memory(0, 0, STEP, trained(3, muon=True), GATHERED)
    share = 44 * 162 / 169
    assert memory.moments == round(4 * share + 8 * (44 - share))
    assert memory.optimizer_step == 2 * 4 * 44 + 2 * 4 * 50, (
        "a bucket of gradients and of momentums"
    )


def test_reducing_a_full_bucket_may_be_the_peak():
    small = replace(STEP, peak=10)
    # Under ZeRO-3 this rank's part in fp32 too
    for stage, peak in ((1, 2 * 50), (2, 2 * 50), (3, 14 + 2 * 50 + 4 * 12)):
        memory = rank_memory(0, 0, small, trained(stage), Gathers())
        assert memory.forward_backward == peak


def test_volumes_of_a_step_at_each_stage():
    volumes = [all_gather_volume(trained(stage), GATHERED, 3) for stage in (1, 2, 3)]
    assert volumes == [2 * 172, 2 * 172, 2 * (round(3 * 200 * 176 / 169) + 8)]
    assert reduced_bytes(trained(3), 3) == 2 * 176 * 3
    alone = trained(3, ranks=1)
    assert all_gather_volume(alone, GATHERED, 3) == reduced_bytes(alone, 3) == 0


GATHERS = """
# all matrices, 162 elements, stay; or a part of them
{} | 162 | 162 | 90
{max_live_parameters: 100} | 224 | 162 | 90
{max_live_parameters: 100, prefetch_bucket_size: 80} | 294 | 110 | 80
{max_live_parameters: 0, max_reuse_distance: 0} | 324 | 90 | 90
"""
"""ZeRO's settings | elements gathered | most of them at once | in the largest call."""


@each_row("settings, elements, most, largest", GATHERS)
def test_what_stays_is_gathered_once(settings, elements, most, largest):
    sizes = {"max_reuse_distance": 60, "prefetch_bucket_size": 90, **parsed(settings)}
    sharded = trained(3, zero={f"stage3_{name}": size for name, size in sizes.items()})
    assert gathers(sharded) == Gathers(int(elements), int(most), int(largest))
    assert gathers(replace(sharded, ranks=1)) == Gathers(), "one rank has everything"


def test_nothing_persists_on_one_rank_or_below_stage_3():
    assert trained(3).persistent == (7,), "up to the threshold, and at it"
    assert trained(3, ranks=1).persistent == () == trained(2).persistent
