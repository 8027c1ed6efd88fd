"""Which messages a process prints: by its rank, by --log_level, and none in a program that
only imports mora_ds.
"""

import errno
import io
import logging
import subprocess
import sys
from pathlib import Path

from mora_ds.runtime.log_setup import set_up_logging
from tests.helpers.tables import each_row

log = logging.getLogger("mora_ds.train.trainer")


SCREENS = """
0 | info | info | [rank 0] warning
0 | debug | debug info | [rank 0] warning
0 | error | - | -
0 | no level | info | [rank 0] warning
1 | info | - | [rank 1] warning
1 | debug | debug info | [rank 1] warning
1 | error | - | -
"""
"""A rank | --log_level | its words on stdout | its line on stderr."""


@each_row("rank, level, out, err", SCREENS)
def test_rank_and_level_decide(
    monkeypatch, capsys, unchanged_logger, rank, level, out, err
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Set up again, as launch/pretrain.py does: no message may be printed twice
    for _ in range(2):
        set_up_logging(level)
    for name in ("debug", "info", "warning"):
        log.log(getattr(logging, name.upper()), "%s", name)
    printed = capsys.readouterr()
    assert printed.out.split() == out.replace("-", "").split()
    assert printed.err.splitlines() == [line for line in (err,) if line != "-"]


class _Full(io.StringIO):
    """A stream to a file on a full disk."""

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_outlives_its_log(monkeypatch, capsys, unchanged_logger):
    set_up_logging()
    monkeypatch.setattr(sys, "stdout", _Full())
    log.info("lost")
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", _Full())
    log.warning("lost")


def test_a_program_without_streams_ends_as_with_them():
    program = """
import logging, sys
from mora_ds.runtime import cli
sys.stdout = sys.stderr = None
cli.run(lambda: logging.getLogger("mora_ds").info("said to nobody"))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_full_disk_for_output_does_not_change_the_exit_code():
    """Bytes that Python could not write stay in its buffer, and fail again at exit."""
    program = """
import logging
from mora_ds.runtime import cli
cli.run(lambda: logging.getLogger("mora_ds").info("lost"))
"""
    with Path("/dev/full").open("w") as full:
        subprocess.run(
            [sys.executable, "-c", program], check=True, stdout=full, stderr=full
        )


def test_a_library_user_gets_silence():
    program = "import logging, mora_ds; logging.getLogger('mora_ds.train').warning('printed by nobody')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
