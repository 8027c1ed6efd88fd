"""Objects travel along a tree, over connections that are made when they are first used."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from mora_ds.runtime.exchange import gather_to_all, gather_to_rank0
from mora_ds.runtime.ranks import Ranks
from tests.helpers.gloo import run_ranks, start_ranks


def sockets():
    """Connections of this process over TCP, listening ones included."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(
        os.readlink(path).startswith("socket:")
        for path in links
        if os.path.lexists(path)
    )


def value_of(rank):
    return {"rank": rank, "text": "x" * (1 + 1000 * rank)}


def gathered():
    group = Ranks.current().group
    rank = dist.get_rank()
    return gather_to_rank0(value_of(rank), group), gather_to_all(rank, group)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_value_arrives_in_the_order_of_ranks(world):
    (run_on_rank0, *elsewhere), everywhere = zip(
        *run_ranks(world, gathered), strict=True
    )
    assert run_on_rank0 == [value_of(rank) for rank in range(world)]
    assert elsewhere == [None] * (world - 1)
    assert list(everywhere) == [list(range(world))] * world


def counted():
    """Sockets before the group is made, once it is made, and after every kind of
    exchange.
    """
    before = sockets()
    ranks = Ranks.current()
    with_group = sockets()
    ranks.barrier("one")
    ranks.run_on_rank0("two", lambda: 1)
    ranks.gather("three", ranks.rank)
    ranks.same("four", {"--seed": 1})
    return before, with_group, sockets()


def test_ranks_are_connected_where_they_talk_and_not_before():
    """If gloo did not wait (`exchange.new_group`), each of 8 ranks would have 7 more
    connections as soon as the group is made."""
    for before, with_group, after in run_ranks(8, counted):
        assert with_group - before <= 3, "the group's own listening sockets"
        assert after - with_group <= 6, (
            "neighbors in the tree and in the ring, of 7 other ranks"
        )


# -- a rank that ends while others wait ------------------------------------------------

VICTIM = 1


def waiting(connected, folder):
    """Leaves a file of this rank in `folder` once a check has failed to which one rank
    never comes.
    """
    ranks = Ranks.current(timeout_s=4.0)
    if connected:
        ranks.barrier("before")
    if ranks.rank == VICTIM:
        os._exit(1)
    with pytest.raises(RuntimeError):
        ranks.barrier("after")
    # The helper's own last meeting fails, too, so that nothing is returned
    (folder / str(ranks.rank)).touch()


@pytest.mark.parametrize("connected", [True, False])
def test_ranks_do_not_wait_for_one_that_has_ended(tmp_path, connected):
    """Also if they were never connected to it, so that they see no broken
    connection."""
    _, processes = start_ranks(3, waiting, connected, tmp_path)
    try:
        for process in processes:
            process.join(90)
        assert all(not process.is_alive() for process in processes), (
            "the others wait without end"
        )
        assert {path.name for path in tmp_path.iterdir()} == {"0", "2"}, (
            "a rank passed the check"
        )
    finally:
        for process in processes:
            process.kill()
            process.join()
