"""Output folders of runs, without their runs."""

from mora_ds.common.errors import UserError
from mora_ds.train import output_folder
from mora_ds.train.output_folder import (
    NAMES,
    abandon,
    names_of_run,
    release,
    reserve,
)
from mora_ds.train.run_file import write_run_file

FOLDERS = tuple(name for name in NAMES if "." not in name)


def a_run(folder, *more):
    """A folder with the files of a finished run, and with those of the names `more` that
    start-up has made.
    """
    reservation = reserve(folder)
    reservation.prepare(False, False, True)
    for name in more:
        put(folder, name, "a run's")
    write_run_file(
        folder, {"seed": 1}, {"steps": 6}, names_of_run(folder, exports=True)
    )
    reservation.commit()
    for name in ("metrics.jsonl", "checkpoints", "ledger"):
        put(folder, name, "a run's")
    forget(folder)
    return folder


def prepared(folder, overwrite, resume, exports=False):
    """A start-up that is given up where it is refused."""
    try:
        reserve(folder).prepare(overwrite, resume, exports)
    except UserError:
        abandon(folder)
        raise


def put(folder, name, text):
    path = folder / name / "file" if name in FOLDERS else folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def forget(folder):
    """Ends the run as if the process had ended."""
    output_folder._reservations.pop(folder.resolve(), None)
    release(folder)
