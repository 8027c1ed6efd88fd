"""Ranks that stay up: a call finds nothing of the one before it."""

import os
import random

import torch

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
