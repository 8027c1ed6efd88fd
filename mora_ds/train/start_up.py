"""What every rank starts inside of, from its flags on. Imports no torch while nothing
fails."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def start_up() -> Iterator[None]:
    """Inside the block, an error of one rank ends all, with the same message and exit
    code: the rank that fails joins the others, if it has not yet, and they raise its
    error at the check that they come to next (`runtime/ranks.py`)."""
    try:
        yield
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from mora_ds.train.setup import end_all

            end_all(error)
        raise
