"""--profile: a trace of some steps of rank 0, which changes nothing of the run."""

import gzip
import json

import pytest

from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import finished_run, run
from tests.helpers.resume import assert_same_run, interrupted_job

FLAGS = "--max_steps 6 --save_steps 3 --report_to none"


def traces(out):
    """The events of each trace, by the time at which it was written."""
    files = sorted((out / "profile").iterdir())
    assert all(file.name.endswith(".pt.trace.json.gz") for file in files), (
        "as TensorBoard looks for them"
    )
    return [
        json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] for file in files
    ]


def steps_in(trace):
    names = {event.get("name", "") for event in trace}
    return {name for name in names if name.startswith("ProfilerStep#")}


@pytest.fixture(scope="module")
def reference(user, tmp_path_factory):
    """A run of two ranks without a profiler."""
    return finished_run(2, user, tmp_path_factory, FLAGS)


def test_rank_0_records_its_products_and_the_run_is_what_it_would_have_been(
    user, out, reference
):
    run(2, user.flags(out, FLAGS, "--profile 2"))
    assert_same_run(out, reference)
    (trace,) = traces(out)
    assert steps_in(trace) == {"ProfilerStep#3", "ProfilerStep#4"}
    products = [event for event in trace if event.get("name") == "aten::mm"]
    assert products
    assert all(event["args"]["Input Dims"] for event in products)


def test_a_run_that_ends_within_writes_what_there_is_and_a_resumed_one_records_anew(
    user, out, reference
):
    argv = user.flags(out, FLAGS, "--profile 5 --resume_from_checkpoint auto")
    run_ranks(2, interrupted_job, argv, 3)
    run(2, argv)
    assert_same_run(out, reference)
    assert [steps_in(trace) for trace in traces(out)] == [
        {"ProfilerStep#3"},
        {"ProfilerStep#6"},
    ]
