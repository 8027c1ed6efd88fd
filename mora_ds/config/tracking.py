"""The names of trackers, and what --report_to may ask for."""

from collections.abc import Iterator, Sequence

from mora_ds.common.errors import unknown

NONE = "none"
KNOWN = ("tensorboard", "wandb", NONE)


def tracker_problems(names: Sequence[str]) -> Iterator[str]:
    """What is wrong with the values of --report_to, one message each."""
    for name in names:
        if name not in KNOWN:
            yield unknown("--report_to", name, KNOWN)
    if NONE in names and len(names) > 1:
        yield f"--report_to {NONE} goes with no other tracker: give {NONE} alone, or the trackers without it"
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        yield f"--report_to names {twice[0]} twice"
