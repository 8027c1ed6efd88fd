"""Signals, dead ranks, dead launchers: saved within two steps, ended within a minute,
resumed bit for bit.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import Stopped
from mora_ds.runtime import signals
from mora_ds.runtime.signals import EXIT_STOPPED
from mora_ds.train.output_folder import reserve
from mora_ds.train.trainer import Trainer
from tests.helpers.errors import user_error
from tests.helpers.gloo import free_port, run_ranks
from tests.helpers.jobs import (
    REPOSITORY,
    environment,
    finished_run,
    held_folder,
    is_rank,
    job,
    launcher,
    ranks_below,
    rows,
    run,
)
from tests.helpers.nodes import wait_for
from tests.helpers.resume import assert_same_run
from tests.helpers.tables import heavy, words
from tests.helpers.tables import rows as rows_of
from tests.helpers.tools import called

MERGING = "--max_steps 9 --merge_every 4 --restart_warmup_steps 1 --eval_steps 4 --save_steps 3"
"""Merges and evaluations after steps 4 and 8; checkpoints at 3, 6 and 9."""
AUTO = "--resume_from_checkpoint auto"


@pytest.fixture(scope="module")
def reference(user, tmp_path_factory):
    """The uninterrupted run."""
    return finished_run(2, user, tmp_path_factory, MERGING)


# -- agreement, on forked ranks --------------------------------------------------------


def signaled_job(argv, number, rank, method, step):
    """A run in which `rank` receives the signal when it enters `method` of the trainer at
    `step`; the message of `Stopped`."""
    signals.install()
    original = getattr(Trainer, method)

    def hit(trainer, *arguments):
        is_there = (trainer.replica.rank, trainer.state.step) == (rank, step)
        if is_there and not signals.requested():
            os.kill(os.getpid(), number)
            while not signals.requested():
                time.sleep(0.001)
        return original(trainer, *arguments)

    setattr(Trainer, method, hit)
    try:
        job(argv)
    except Stopped as stopped:
        return str(stopped)
    raise AssertionError("the run was to stop")


STOPS = """
SIGTERM | 1 | nll | 4 | 5
SIGUSR1 | 0 | _merge | 4 | 4
SIGINT | 1 | _evaluate | 9 | 9
SIGTERM | 1 | _evaluate | 4 | 4
SIGUSR1 | 1 | _save | 3 | 3
"""
"""A signal | the rank that gets it | the method that it is in | at a step | the step that is
saved; the last two are for the heavy tests."""


@pytest.mark.parametrize(
    "name, rank, method, step, saved",
    [*rows_of(STOPS)[:3], *(heavy(*row) for row in rows_of(STOPS)[3:])],
)
def test_a_signal_to_one_rank_stops_all_at_one_step_and_nothing_is_lost(
    user, reference, out, name, rank, method, step, saved
):
    argv = user.flags(out, MERGING)
    hit = (signal.Signals[name], int(rank), method, int(step))
    output = run_ranks(2, signaled_job, argv, *hit)
    assert output[0] == output[1]
    assert f"stopped at step {saved}" in output[0]
    state = TrainerState.read(out / "checkpoints/latest")
    assert (state.step, state.finished) == (int(saved), False)
    run(2, user.flags(out, MERGING, AUTO))
    assert_same_run(out, reference)


def test_a_signal_before_the_first_step_leaves_nothing_to_resume(user, reference, out):
    flags = user.flags(out, MERGING, AUTO)
    output = run_ranks(2, signaled_job, flags, signal.SIGUSR1, 1, "_evaluate", 0)
    assert "before the first step" in output[0]
    assert not (out / "checkpoints").exists()
    run(2, flags)
    assert_same_run(out, reference)


# -- one process, no torch -------------------------------------------------------------

SCRIPT = """
import multiprocessing, os, sys, threading, time
from mora_ds.common.errors import Stopped
from mora_ds.runtime import cli, signals

def worker(_):
    time.sleep(60)

def starting():
    print("ready", flush=True)
    time.sleep(60)

def stuck():  # as in a collective that does not return
    with signals.deferred():
        print("ready", flush=True)
        while True:
            threading.Lock().acquire() if not signals.requested() else time.sleep(60)

def held():  # as where the main thread waits for other ranks
    signals._PATIENCE_S = 0.5
    try:
        starting()
    except Stopped:
        time.sleep(60)

def patient():
    signals._PATIENCE_S = 0.1
    with signals.deferred():
        print("ready", flush=True)
        while not signals.requested():
            time.sleep(0.01)
        time.sleep(0.3)
        for _ in range(2000):
            print("x" * 100)
        sys.stdout.flush()
        signals.ignore_requests()

def pooled():
    with signals.deferred():
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            pool.map_async(worker, range(2))
            time.sleep(0.2)
        time.sleep(0.7)
        print("requested", signals.requested(), flush=True)

cli.run(globals()[sys.argv[1]], restartable=True)
"""


def script(function, **more):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, function],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def ready(process):
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_with_nothing_to_save_a_signal_ends_the_process_at_once(number):
    process = ready(script("starting"))
    process.send_signal(number)
    _, output = process.communicate(timeout=5)
    assert process.returncode == EXIT_STOPPED
    assert number.name in output
    assert "nothing to save" in output


def test_a_main_thread_that_waits_with_nothing_to_save_is_given_some_seconds():
    process = ready(script("held"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_STOPPED


def test_sigint_again_ends_a_process_whatever_it_does():
    process = ready(script("stuck"))
    for _ in range(2):  # the terminal's, and the same once more from torchrun
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    time.sleep(signals.SAME_CTRL_C_S)
    assert process.poll() is None, "one Ctrl-C is one, however often it arrives"
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "immediately" in output


def test_a_log_reader_that_ctrl_c_has_ended_too_does_not_fail_the_checkpoint():
    process = ready(script("patient"))
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 0, process.stderr.read()


def test_the_end_of_a_pool_is_no_request_to_stop():
    out, errors = script("pooled").communicate(timeout=20)
    assert out == "requested False\n", errors


# -- whole jobs under the launcher -----------------------------------------------------


@pytest.fixture
def start(user, tmp_path):
    """Starts a long job under `deepspeed` in a new process group and waits for its first
    checkpoint; one of another `script` may not come to it.
    """
    processes = []

    def begin(script=None):
        out = tmp_path / "out"
        log = tmp_path / "log"
        argv = user.flags(out, MERGING, "--max_steps 5000 --eval_steps 0")
        line = launcher(2, argv)
        if script:
            line[line.index("--num_gpus") + 2] = str(script)
        with log.open("w") as file:
            process = subprocess.Popen(
                line,
                cwd=tmp_path,
                env=environment(),
                stdout=file,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        processes.append(process)
        if not script:
            wait_for(out / "checkpoints/step-000003", [process])
        return process, log, ranks_below(process.pid)

    yield begin
    for process in processes:
        for rank in [*ranks_below(process.pid), process.pid]:
            if is_rank(rank) or process.poll() is None:
                os.kill(rank, signal.SIGKILL)
        process.wait()


def gone_within(ranks, seconds):
    until = time.monotonic() + seconds
    while any(is_rank(rank) for rank in ranks):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.heavy
def test_a_signal_to_one_rank_reaches_the_launcher_as_75(start, out):
    process, log, ranks = start()
    os.kill(ranks[1], signal.SIGTERM)
    seen = rows(out)[-1]["step"]
    assert process.wait(timeout=60) == EXIT_STOPPED
    assert "[rank 1] SIGTERM: saving" in log.read_text()
    assert "continue with --resume_from_checkpoint auto" in log.read_text()
    saved = TrainerState.read(out / "checkpoints/latest").step
    assert saved == rows(out)[-1]["step"] <= seen + 3, (
        "two steps, and one that was logged meanwhile"
    )


CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
"""Process 1, whose signals have no effect unless it handles them, as by `docker stop`."""


@pytest.mark.heavy(seconds=60)
@pytest.mark.parametrize("inside", [(), CONTAINER], ids=["terminal", "container"])
def test_a_signal_to_the_program_that_started_the_ranks_saves(
    user, tmp_path, out, inside
):
    if inside and called([*inside, "true"]).returncode:
        pytest.skip("no namespaces of processes here")
    argv = user.flags(out, MERGING, "--max_steps 5000 --eval_steps 0")
    port = ["--master_port", str(free_port())]
    program = [sys.executable, "-m", "mora_ds", "pretrain", "--num_gpus", "2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*inside, *program, *port, *argv],
            env={**environment(), "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(out / "checkpoints/step-000003", [process])
        started = psutil.Process(process.pid)
        first = started.children()[0] if inside else started
        first.send_signal(signal.SIGTERM)
        text = (tmp_path / "log").read_text
        assert process.wait(timeout=60) == EXIT_STOPPED, text()
        saved = TrainerState.read(out / "checkpoints/latest").step
        assert saved == rows(out)[-1]["step"], text()
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.wait()


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_save_and_leave_when_their_launcher_ends(start, out, number):
    """Ctrl-C and SIGTERM to all processes; SIGKILL to the parent of the ranks alone."""
    process, log, ranks = start()
    parent = psutil.Process(ranks[0]).ppid()
    os.kill(parent if number == signal.SIGKILL else -process.pid, number)
    process.wait(timeout=60)
    assert len(ranks) == 2, log.read_text()
    assert gone_within(ranks, 30), log.read_text()
    state = TrainerState.read(out / "checkpoints/latest")
    assert state.step == rows(out)[-1]["step"], "no step was lost"


@pytest.mark.heavy
def test_a_killed_rank_takes_the_job_down(start):
    process, log, ranks = start()
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=60) == 256 - signal.SIGKILL, (
        "its exit code, not that of the other ranks"
    )
    assert gone_within(ranks, 60 - (time.monotonic() - began))
    assert "[rank 0] error: lost contact with another rank" in log.read_text()


@pytest.mark.heavy
def test_torchrun_starts_a_run_again_that_has_lost_a_rank(
    user, reference, tmp_path, out
):
    """As the guide says: --max-restarts, --resume_from_checkpoint auto, and a new store for
    each start. In the one that torch 2.13 shares by default, processes which are started
    again find the addresses of the dead ones."""
    program = Path(sys.executable).with_name("torchrun")
    start = "--standalone --nproc_per_node 2 --max-restarts 2"
    job_file = REPOSITORY / "launch/pretrain.py"
    line = words(program, start, job_file, *user.flags(out, MERGING, AUTO))
    settings = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            line, cwd=tmp_path, env=settings, stdout=log, stderr=log
        )
        try:
            wait_for(out / "checkpoints/step-000003", [process])
            os.kill(ranks_below(process.pid)[1], signal.SIGKILL)
            assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
    assert "resumed from" in (tmp_path / "log").read_text()
    assert_same_run(out, reference)


FAULTY = """
import sys
sys.path.insert(0, {repository!r})
from mora_ds.runtime import cli

def main():
    from mora_ds.config.arguments import parse
    from mora_ds.commands.pretrain import train
    from mora_ds.train.trainer import Trainer
    step = Trainer.train_step

    def faulty(trainer):
        if trainer.replica.rank == 1 and trainer.state.step == 2:
            raise ZeroDivisionError("on one rank only")
        step(trainer)

    Trainer.train_step = faulty
    train(parse(sys.argv[1:]))

cli.run(main, restartable=True)
"""


@pytest.mark.heavy
def test_an_exception_on_one_rank_is_printed_once_by_that_rank(start, tmp_path):
    script = tmp_path / "pretrain.py"
    script.write_text(FAULTY.format(repository=str(REPOSITORY)))
    process, log, _ = start(script)
    assert process.wait(timeout=60) == 1
    output = log.read_text()
    assert output.count("Traceback") == 1
    assert "[rank 1] Traceback" in output
    assert output.count("ZeroDivisionError: on one rank only") == 1


def test_the_lock_of_a_folder_goes_with_its_process_however_that_ends(tmp_path):
    with (
        held_folder(tmp_path),
        user_error(r"alive \(process \d+\); end them first"),
    ):
        reserve(tmp_path)
    reserve(tmp_path)
