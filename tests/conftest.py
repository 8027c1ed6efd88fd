"""Settings of the test processes, the order of the test files, and the fixture that many of them share.

The environment is set before any test imports torch: one thread a process (the distributed tests start several), the
CPU accelerator, nothing from the network.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import pytest

from tests.helpers.slices import deal, slice_of

if TYPE_CHECKING:
    from tests.helpers.jobs import Playground

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A worker for each core where more than one file is asked for, unless `-n` says otherwise.

    All tests of a file go to one worker, so that its fixtures are made once. Needs pytest-xdist, of the extra `test`.
    """
    if hasattr(config, "workerinput"):  # a worker runs this hook too, and must not start workers of its own
        return
    option = config.option
    one_file = len(config.args) == 1 and config.args[0].partition("::")[0].endswith(".py")
    if config.pluginmanager.has_plugin("xdist") and option.numprocesses is None and not one_file and not option.usepdb:
        option.numprocesses, option.dist = len(os.sched_getaffinity(0)), "loadfile"
        option.loadscopereorder = False  # ours is below


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--heavy-slice", metavar="K/N", type=slice_of, help="with -m heavy: slice K (from 0) of N, no more"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a slice of the tests where one is asked for, and move the files with distributed tests to the front.

    Those take longest, and a long one at the end would leave a worker idle.
    """
    if chosen := config.getoption("heavy_slice"):
        number, slices = chosen
        dealt = deal((item.nodeid for item in items), slices)
        config.hook.pytest_deselected(items=[item for item in items if dealt[item.nodeid] != number])
        items[:] = [item for item in items if dealt[item.nodeid] == number]
    distributed = {item.path for item in items if item.get_closest_marker("gloo")}
    items.sort(key=lambda item: item.path not in distributed)


def pytest_collection_finish() -> None:
    """The collector of garbage need not walk the modules and the collected tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    """What a user has: a model, a tokenizer, files. Each file of tests has its own."""
    from tests.helpers.jobs import playground  # not above: it imports torch

    return playground(tmp_path_factory.mktemp("user"))
