"""Ranks that stay up: a call finds nothing of the one before it, and one that fails takes
its pool with it.
"""

import os
import random
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.gloo import RankFailed
from tests.helpers.pool import run_pooled


def seen():
    """This process, and all that `leave_something` changes."""
    numbers = random.random(), torch.rand(1).item()
    return os.getpid(), (
        os.environ.get("LEFT"),
        os.getcwd(),
        numbers,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


def leave_something():
    os.environ["LEFT"] = "something"
    os.chdir("/")
    random.seed(1)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)


def test_a_call_leaves_nothing_behind():
    before = run_pooled(2, seen)
    run_pooled(2, leave_something)
    assert run_pooled(2, seen) == before


def fail(how):
    """On one of two ranks."""
    if dist.get_rank() == 0:
        # It says nothing either, not even that its connection is closed
        if how == "no word":
            time.sleep(60)
        return
    if how == "an exception":
        raise ValueError("odd")
    if how == "no word":
        os._exit(3)
    time.sleep(60)


@pytest.mark.parametrize(
    "how, message",
    [
        ("an exception", "ValueError: odd"),
        ("no word", "^rank 1 died without a word$"),
        ("no answer", "in time"),
    ],
)
def test_a_call_that_fails_ends_its_pool(how, message):
    before = {process for process, _ in run_pooled(2, seen)}
    with pytest.raises(RankFailed, match=message):
        run_pooled(2, fail, how, timeout_s=3 if how == "no answer" else 60)
    assert not before & {process for process, _ in run_pooled(2, seen)}
