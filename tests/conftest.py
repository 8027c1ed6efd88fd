"""Settings of the test processes, the order of the test files, and the fixture that many of
them share.

The environment is set before any test imports torch: one thread a process (the distributed
tests start several), the CPU accelerator unless GPU tests are asked for, nothing from the
network.
"""

import collections
import gc
import os
import time

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# transformers would look for kernels, for each model that the tests load by themselves
os.environ.setdefault("USE_HUB_KERNELS", "NO")
# gcsfs would ask over gRPC what kind a bucket is, which the emulator of the tests cannot tell
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def pytest_configure(config):
    """DeepSpeed's accelerator: the CPU, but for `pytest -m gpu`, which takes the one that
    is there.
    """
    if config.option.markexpr != "gpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A worker for each core where more than one file is asked for, unless `-n` says
    otherwise.

    All tests of a file go to one worker, so that its fixtures are made once. Needs
    pytest-xdist, of the extra `test`.
    """
    # A worker runs this hook too, and must not start workers of its own
    if hasattr(config, "workerinput"):
        return
    option = config.option
    one_file = len(config.args) == 1 and config.args[0].partition("::")[0].endswith(
        ".py"
    )
    if (
        config.pluginmanager.has_plugin("xdist")
        and option.numprocesses is None
        and not one_file
        and not option.usepdb
    ):
        option.numprocesses = len(os.sched_getaffinity(0))
        option.dist = "loadfile"
        option.loadscopereorder = False  # ours is below


NOT_RUN = "not run: it could have run beyond --stop-at"


def pytest_addoption(parser):
    parser.addoption(
        "--stop-at",
        metavar="TIME",
        type=float,
        help="seconds since 1970; tests whose time limit ends later are not started, and named at the end",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Move the longest files to the front: a long one at the end would leave a worker
    idle.
    """
    seconds = collections.Counter()
    for item in items:
        seconds[item.path] += expected_seconds(item)
    items.sort(key=lambda item: -seconds[item.path])


STARTS_PROCESSES = frozenset(
    (
        "run_ranks",
        "run_pooled",
        "start_ranks",
        "run",
        "called",
        "validation_errors_of",
        "launch",
        "launcher",
        "killed_run",
        "stop_and_resume",
    )
)
"""Names of the helpers, and of `subprocess.run`, that start processes."""


def pytest_itemcollected(item):
    """Mark a test that starts processes itself, by the names that its code uses."""
    if isinstance(item, pytest.Function) and not STARTS_PROCESSES.isdisjoint(
        item.function.__code__.co_names
    ):
        item.add_marker("gloo")


def expected_seconds(item):
    """What a test takes, roughly: what its mark `heavy(seconds=...)` says; more where it
    starts processes.
    """
    if heavy := item.get_closest_marker("heavy"):
        return int(heavy.kwargs.get("seconds", 8))
    return 2 if item.get_closest_marker("gloo") else 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Leave out a test that its time limit would let run beyond `--stop-at`."""
    stop_at = item.config.getoption("stop_at")
    limit = item.get_closest_marker("timeout")
    limit_s = limit.args[0] if limit else float(item.config.getini("timeout"))
    if stop_at is not None and time.time() + limit_s > stop_at:
        pytest.skip(NOT_RUN)


def pytest_terminal_summary(terminalreporter):
    left_out = [
        report.nodeid
        for report in terminalreporter.stats.get("skipped", [])
        if NOT_RUN in report.longrepr[2]
    ]
    if left_out:
        terminalreporter.section(
            f"not run: {len(left_out)} tests, as their time was up", red=True, bold=True
        )
        for name in left_out:
            terminalreporter.write_line(name)


def pytest_collection_finish():
    """The collector of garbage need not walk the modules and the collected tests again and
    again.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A user's model, tokenizer and files. Each file of tests has its own."""
    from tests.helpers.jobs import playground  # not above: it imports torch

    return playground(tmp_path_factory.mktemp("user"))


@pytest.fixture
def out(request, tmp_path):
    """The output folder of a test's run, which is not there yet. `OVER_STORES` has the
    checkpoints of the run in memory and in a bucket too.
    """
    if getattr(request, "param", "disk") == "disk":
        yield tmp_path / "out"
        return
    from tests.helpers import stores  # not above: it imports torch

    if request.param == "bucket":
        endpoint = request.getfixturevalue("s3").endpoint
        (tmp_path / stores.ENDPOINT).write_text(endpoint)
        yield tmp_path / "out"
        return
    with stores.in_memory(tmp_path):
        yield tmp_path / "out"


@pytest.fixture(scope="session")
def s3():
    """A server of S3, with a bucket."""
    from tests.helpers.buckets import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture
def merged(tmp_path):
    """The folder of a test's merged model, which is not there yet."""
    return tmp_path / "merged"


@pytest.fixture
def base_folder(tmp_path):
    """The folder of a test's base, which is not there yet."""
    return tmp_path / "base"


@pytest.fixture
def model_folder(tmp_path):
    """The folder of another model that a test writes, which is not there yet."""
    return tmp_path / "model"
