"""Which messages a process prints: by its rank, by --log_level, and none in a program that
only imports mora_ds.
"""

import logging
import subprocess
import sys

import pytest

from mora_ds.runtime.log_setup import set_up_logging
from tests.helpers.tables import rows

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


@pytest.mark.parametrize("rank, level, out, err", rows(SCREENS))
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
    told = capsys.readouterr()
    assert told.out.split() == out.replace("-", "").split()
    assert told.err.splitlines() == [line for line in (err,) if line != "-"]


def test_a_library_user_gets_silence():
    program = "import logging, mora_ds; logging.getLogger('mora_ds.train').warning('printed by nobody')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
