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
    config = {"zero_optimization": zero, **changes.pop("config", {})}
    return replace(Trained((101, 61, 7), 80, 2, 4, 2, config), **changes)


@pytest.mark.parametrize(
    "stage, squares, masters, moments, gradients, bucket",
    [
        (1, 338, 172, 344, 676, 100),
        (2, 338, 172, 344, 172, 100),
        (3, 88, 176, 352, 176, 100),
    ],
)
def test_what_a_rank_holds_at_each_stage(
    stage, squares, masters, moments, gradients, bucket
):
    memory = rank_memory(
        1000, 70, STEP, trained(stage), GATHERED if stage == 3 else Gathers()
    )
    sizes = (
        memory.squares,
        memory.masters,
        memory.moments,
        memory.gradients,
        memory.bucket,
    )
    assert sizes == (squares, masters, moments, gradients, bucket)
    assert memory.static == 1000 + 20 + sum(sizes)
    assert (memory.activations, memory.host_save, memory.host_optimizer) == (
        300,
        4 * 169,
        0,
    )
    shard = 44 if stage == 3 else 43
    stays = 14 if stage == 3 else 0
    assert memory.optimizer_step == 2 * 4 * shard
    assert (memory.merge, memory.save) == (70 + 2 * 404 + stays, 2 * 404 + stays)
    assert memory.gathered == (2 * (90 + 7) if stage == 3 else 0)
    again = 2 * 40 if stage == 3 else 0  # backward gathers again, into an output buffer
    assert memory.forward_backward == memory.gathered + again + 500
    assert memory.peak == memory.static + max(
        memory.forward_backward, memory.merge, memory.optimizer_step
    )


def test_where_else_states_of_the_optimizer_are():
    memory = rank_memory(
        0, 0, STEP, trained(2, zero={"offload_optimizer": {"device": "cpu"}}), GATHERED
    )
    assert (memory.masters, memory.moments, memory.gradients, memory.optimizer_step) == (
        0,
        0,
        0,
        0,
    )
    assert memory.host_optimizer == 172 + 344 + 172
    assert memory.merge == 0
    assert (
        rank_memory(0, 0, STEP, trained(2, on_cpu=True), GATHERED).optimizer_step
        == 3 * 4 * 43
    )


def test_muon_has_one_moment_of_a_matrix_and_gathers_some_at_a_time():
    memory = rank_memory(0, 0, STEP, trained(3, muon=True), GATHERED)
    share = 44 * 162 / 169
    assert memory.moments == round(4 * share + 8 * (44 - share))
    assert memory.optimizer_step == 2 * 4 * 44 + 2 * 4 * 50, (
        "a bucket of gradients and of momentums"
    )


def test_reducing_a_full_bucket_may_be_the_peak():
    small = replace(STEP, peak=10)
    peaks = {
        stage: rank_memory(0, 0, small, trained(stage), Gathers()) for stage in (1, 2, 3)
    }
    assert peaks[1].forward_backward == peaks[2].forward_backward == 2 * 50
    assert peaks[3].forward_backward == 14 + 2 * 50 + 4 * 12, "this rank's part in fp32 too"


def test_volumes_of_a_step_at_each_stage():
    volumes = {
        stage: all_gather_volume(trained(stage), GATHERED, accumulation=3)
        for stage in (1, 2, 3)
    }
    assert volumes[1] == volumes[2] == 2 * 172
    assert volumes[3] == 2 * (round(3 * 200 * 176 / 169) + 8)
    assert all_gather_volume(trained(3, ranks=1), GATHERED, 3) == 0
    assert [reduced_bytes(trained(3, ranks=ranks), 3) for ranks in (1, 4)] == [
        0,
        2 * 176 * 3,
    ]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, Gathers(elements=162, most_at_once=162, largest_call=90)),
        ({"max_live_parameters": 100}, Gathers(2 * 162 - 100, 162, 90)),
        (
            {"max_live_parameters": 100, "prefetch_bucket_size": 80},
            Gathers(2 * 162 - 30, 30 + 80, 80),
        ),
        ({"max_live_parameters": 0, "max_reuse_distance": 0}, Gathers(2 * 162, 90, 90)),
    ],
)
def test_what_stays_is_gathered_once(settings, expected):
    sizes = {"max_reuse_distance": 60, "prefetch_bucket_size": 90, **settings}
    sharded = trained(3, zero={f"stage3_{name}": size for name, size in sizes.items()})
    assert gathers(sharded) == expected
    assert gathers(replace(sharded, ranks=1)) == Gathers(), "one rank has everything"


def test_nothing_persists_on_one_rank_or_below_stage_3():
    assert trained(3).persistent == (7,), "up to the threshold, and at it"
    assert trained(3, ranks=1).persistent == () == trained(2).persistent
