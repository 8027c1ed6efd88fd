"""What stands beside training: forward passes of evaluations, tasks, probes and checks,
and failures that must not cost the run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from mora_ds.adapters.domains import domains_of
from mora_ds.common.errors import BESIDE, reason
from mora_ds.parallel.ulysses import whole_rows

logger = logging.getLogger(__name__)


@contextmanager
def training_goes_on(what: str, failures: list[str]) -> Iterator[None]:
    """A context in which a failure gives `failures` a line, and the run goes on."""
    try:
        yield
    # Packages of others raise what they like.
    except BESIDE as error:
        failures.append(f"{what}: {reason(error)}")
        logger.error(f"{failures[-1]}. Training goes on")


@contextmanager
def beside_training(
    engine: Any, domain: str | None = None, whole: bool = False
) -> Iterator[None]:
    """A context that sets all that layers read besides their input, so that nothing of
    the last training batch acts on a pass: no gradients, no dropout, every row read as
    of `domain` (None: by the shared matrices alone). Afterwards all is as it was
    before.

    `engine`: or a model. `whole`: each process computes complete rows by itself, also
    where it shares those of training with others (--sequence_parallel_size).
    """
    model = getattr(engine, "module", engine)
    was_training = model.training
    model.eval()
    rows = whole_rows(model) if whole else nullcontext()
    try:
        with torch.no_grad(), domains_of(model).using(domain), rows:
            yield
    finally:
        model.train(was_training)
