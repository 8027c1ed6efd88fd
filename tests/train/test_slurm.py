"""launch/slurm.sbatch under a real Slurm: what ends a job for good, what makes it go on, and
that it goes on to the bit.
"""

import sys
import time

import pytest

from mora_ds.checkpoint.state import TrainerState
from mora_ds.runtime.signals import EXIT_STOPPED
from tests.helpers.jobs import REPOSITORY, finished_run, rows
from tests.helpers.resume import assert_same_run
from tests.helpers.slurm import trouble, two_nodes

pytestmark = [
    pytest.mark.heavy(seconds=200),
    pytest.mark.timeout(900),
    pytest.mark.skipif(trouble() is not None, reason=str(trouble())),
]

SCRIPT = REPOSITORY / "launch/slurm.sbatch"
STEPS = "--max_steps 240 --merge_every 50 --restart_warmup_steps 1 --save_steps 10 --eval_steps 0"
SMALL = "--nodes=2 --gpus-per-node=1 --ntasks-per-node=1 --cpus-per-task=1 --time=20"
EXPORTED = {
    "PYTHON": sys.executable,
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}
"""Nothing else of this environment, as under --export=NONE: not even PATH."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with two_nodes(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submit(slurm, flags, *more):
    """From a folder that is not the checkout."""
    exported = ",".join(f"{name}={value}" for name, value in EXPORTED.items())
    return slurm.submit(SCRIPT, flags, *SMALL.split(), f"--export={exported}", *more)


def saved_step(out):
    latest = out / "checkpoints/latest"
    return TrainerState.read(latest).step if latest.exists() else 0


def wait_for_steps(slurm, job, out, beyond):
    until = time.monotonic() + 150
    while saved_step(out) <= beyond:
        assert time.monotonic() < until, slurm.log(job)
        assert slurm.state(job)["JobState"] in ("PENDING", "RUNNING"), slurm.log(job)
        time.sleep(0.05)


def ended(slurm, job, out, state):
    """Check that a job has ended for good, with all that it has trained."""
    fields = slurm.wait(job, state)
    log = slurm.log(job)
    assert f"attempt 0 ended with code {EXIT_STOPPED}" in log, log
    assert fields["Restarts"] == "0"
    assert slurm.call("squeue", "--noheader") == "", log
    assert saved_step(out) == rows(out)[-1]["step"], log


def test_a_job_ends_when_it_should_and_goes_on_to_the_bit(
    slurm, user, out, tmp_path_factory
):
    reference = finished_run(2, user, tmp_path_factory, STEPS)
    flags = user.flags(out, STEPS)

    job = submit(slurm, flags)
    wait_for_steps(slurm, job, out, beyond=0)
    slurm.call("scancel", job)
    ended(slurm, job, out, "CANCEL")

    job = submit(slurm, flags)
    wait_for_steps(slurm, job, out, beyond=saved_step(out))
    slurm.call("scancel", "--signal=USR1", job)
    ended(slurm, job, out, "FAILED")

    job = submit(slurm, flags)
    wait_for_steps(slurm, job, out, beyond=saved_step(out))
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(job, "PENDING")
    # A job that was requeued waits for two minutes otherwise
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    fields = slurm.wait(job, "COMPLETED")
    assert fields["Restarts"] == "1", slurm.log(job)
    assert_same_run(out, reference)


def test_a_job_goes_on_after_its_time(slurm, user, out):
    """Slurm looks at time limits every 30 seconds, and sends the signal 30 seconds
    early."""
    flags = user.flags(out, STEPS, "--max_steps 100000")
    job = submit(slurm, flags, "--time=1", "--signal=B:USR1@1")
    wait_for_steps(slurm, job, out, beyond=0)
    slurm.wait(job, "PENDING")
    assert saved_step(out) == rows(out)[-1]["step"]
    assert slurm.state(job)["Restarts"] == "1", slurm.log(job)
    slurm.call("scancel", job)
    slurm.wait(job, "CANCEL")
