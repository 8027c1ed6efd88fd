"""Contexts for forward passes outside of training (evaluations, tasks, checks), and for
failures that must not end the run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from mora_ds.adapters.domains import domains_of
from mora_ds.common.errors import NON_FATAL_ERRORS, reason
from mora_ds.parallel.ulysses import full_sequences

logger = logging.getLogger(__name__)


@contextmanager
def non_fatal(what: str, failures: list[str]) -> Iterator[None]:
    """A context that logs an error, appends it to `failures`, and suppresses it."""
    try:
        yield
    # Third-party packages may raise any error.
    except NON_FATAL_ERRORS as error:
        failures.append(f"{what}: {reason(error)}")
        logger.error(f"{failures[-1]}. Training continues")


@contextmanager
def eval_mode(
    engine: Any, domain: str | None = None, unsplit: bool = False
) -> Iterator[None]:
    """A context for forward passes that are independent of the training batch: no
    gradients, no dropout, all sequences with the matrices of `domain` (None: the shared
    matrices alone). Restores the previous state on exit.

    `engine`: an engine or a model. `unsplit`: each rank computes full sequences, even if
    training splits them over ranks (--sequence_parallel_size).
    """
    model = getattr(engine, "module", engine)
    was_training = model.training
    model.eval()
    sequences = full_sequences(model) if unsplit else nullcontext()
    try:
        with torch.no_grad(), domains_of(model).using(domain), sequences:
            yield
    finally:
        model.train(was_training)
