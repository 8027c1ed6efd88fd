"""Ranks meet at checks that have names: they go on together, or all of them fail with the
same error.
"""

import time

import pytest
import torch.distributed as dist

from mora_ds.common.errors import RunError, UserError
from mora_ds.runtime.ranks import Ranks, names_of_ranks
from tests.helpers.gloo import run_ranks
from tests.helpers.pool import run_pooled


def fail(error):
    if error is not None:
        raise error


def error_of(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def meetings(rank):
    """Case -> the error of this rank where `rank` alone does something else than the
    others.
    """
    ranks = Ranks.current()
    is_odd = dist.get_rank() == rank
    odd = f"of rank {rank}"

    def between():
        try:
            if is_odd:
                raise UserError(odd)
            ranks.agree("loading", lambda: None)
        except UserError as error:
            ranks.abort(error)
            raise

    def nested():
        """A check inside of a check, as the token cache has."""
        ranks.agree(
            "outer", lambda: fail(UserError(odd)) if is_odd else ranks.barrier("inner")
        )

    def loading(error, elsewhere=None):
        """A check in which the odd rank fails, and the others where `elsewhere` is an error
        of theirs.
        """
        return lambda: ranks.agree(
            "loading", lambda: fail(error if is_odd else elsewhere)
        )

    cases = {
        "same check": loading(UserError(odd)),
        "user error first": loading(UserError(odd), RunError("no")),
        "unexpected": loading(KeyError(odd)),
        "different checks": lambda: (
            ranks.barrier("one") if is_odd else ranks.run_on_rank0("other", lambda: 1)
        ),
        "between checks": between,
        "nested": nested,
        "shared work": lambda: ranks.map(
            lambda number: fail(UserError(odd)) if number == rank else 0,
            dist.get_world_size(),
        ),
        "values": lambda: ranks.same("settings", {"--seed": int(is_odd), "--lr": 0.1}),
        "healthy": lambda: ranks.barrier("end"),
    }
    return {name: error_of(work) for name, work in cases.items()}


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_fail_alike_and_meet_again_afterwards(rank):
    results = run_pooled(2, meetings, rank)
    where = "" if rank == 0 else "rank 1: "
    for name in (
        "same check",
        "user error first",
        "between checks",
        "nested",
        "shared work",
    ):
        for outcome in results:
            assert outcome[name] == f"UserError: {where}of rank {rank}", name
    assert results[rank]["unexpected"] == f"KeyError: 'of rank {rank}'"
    assert (
        results[1 - rank]["unexpected"]
        == f"RunError: {where}KeyError: 'of rank {rank}'"
    )
    for result in results:
        for word in ("UserError", "'one'", "'other'", f"rank {rank} at"):
            assert word in result["different checks"]
        assert result["values"] == (
            "UserError: settings: not the same on all ranks; give every rank the same\n"
            f"  --seed: {int(rank == 0)} on rank 0; {int(rank == 1)} on rank 1"
        )
        assert result["healthy"] == "none"


def test_equal_settings_are_compared_by_a_digest(monkeypatch):
    """Those of 1,000 sources take 300 kB, of each rank, on each rank."""
    sent = []

    def gather(ranks, check, value):
        sent.append(value)
        return [value] * ranks.world

    monkeypatch.setattr(Ranks, "gather", gather)
    Ranks(0, 4096, 0, None, 1.0).same("settings", {"sources": ["name"] * 10_000})
    assert [len(value) for value in sent] == [64]


def late(seconds):
    ranks = Ranks.current(timeout_s=seconds)
    since = time.monotonic()
    ranks.barrier("both are here")
    if dist.get_rank() == 1:
        time.sleep(3 * seconds)
        return "", 0.0
    message = error_of(lambda: ranks.barrier("reading of the settings"))
    return message, time.monotonic() - since


def test_a_rank_that_does_not_come_is_not_waited_for_without_end():
    message, seconds = run_ranks(2, late, 1.0)[0]
    began = "RunError: reading of the settings: not all ranks came within 1 s"
    assert message.startswith(began)
    assert "(--collective_timeout_s); missing: rank 1, which are still busy" in message
    assert seconds < 6


def long_work():
    return Ranks.current(timeout_s=1.0).run_on_rank0(
        "tokens", lambda: (time.sleep(2), 5)[1], long=True
    )


def test_long_work_is_waited_for():
    assert run_pooled(2, long_work) == [5, 5]


def test_many_ranks_are_not_all_named():
    assert names_of_ranks([3]) == "rank 3"
    assert (
        names_of_ranks(list(range(1, 10)))
        == "ranks 1, 2, 3, 4, 5, 6, 7, 8 ... (9 in all)"
    )
