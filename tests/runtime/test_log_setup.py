"""Which messages a process prints: by its rank, by --log_level, and none in a program that
only imports mora_ds.
"""

import logging
import subprocess
import sys

import pytest

from mora_ds.runtime.log_setup import LOGGER, set_up_logging

log = logging.getLogger("mora_ds.train.trainer")


@pytest.fixture(autouse=True)
def unchanged_logger():
    logger = logging.getLogger(LOGGER)
    before = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers = before[0]
    logger.propagate = before[1]
    logger.setLevel(before[2])


@pytest.mark.parametrize(
    "rank, level, out, err",
    [
        ("0", "info", "info\n", "[rank 0] warning\n"),
        ("0", "debug", "debug\ninfo\n", "[rank 0] warning\n"),
        ("0", "error", "", ""),
        ("0", "no level", "info\n", "[rank 0] warning\n"),
        ("1", "info", "", "[rank 1] warning\n"),
        ("1", "debug", "debug\ninfo\n", "[rank 1] warning\n"),
        ("1", "error", "", ""),
    ],
)
def test_rank_and_level_decide(monkeypatch, capsys, rank, level, out, err):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    # Set up again, as launch/pretrain.py does: no message may be printed twice
    for _ in range(2):
        set_up_logging(level)
    for name in ("debug", "info", "warning"):
        log.log(getattr(logging, name.upper()), "%s", name)
    assert capsys.readouterr() == (out, err)


def test_a_library_user_gets_silence():
    program = "import logging, mora_ds; logging.getLogger('mora_ds.train').warning('printed by nobody')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
