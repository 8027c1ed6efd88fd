"""Forward passes of a run that are not training's: evaluations, tasks, probes, and the checks before the first step."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from mora_ds.adapters.domains import domains_of
from mora_ds.parallel.ulysses import whole_rows


@contextmanager
def beside_training(engine: Any, domain: str | None = None, whole: bool = False) -> Iterator[None]:
    """A context that sets all that layers read besides their input, so that nothing of the last training batch acts on
    a pass: no gradients, no dropout, every row read as of `domain` (None: by the shared matrices alone). Afterwards all
    is as it was before.

    `engine`: or a model. `whole`: each process computes complete rows by itself, also where it shares those of training
    with others (--sequence_parallel_size).
    """
    model = getattr(engine, "module", engine)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            domains_of(model).using(domain),
            whole_rows(model) if whole else nullcontext(),
        ):
            yield
    finally:
        model.train(was_training)
