"""Two nodes with an address each: the same losses as on one; a cut cable ends the run,
which can be resumed.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mora_ds.checkpoint.layout import step_of
from mora_ds.checkpoint.manager import complete_checkpoints
from tests.helpers import remote_shell
from tests.helpers.jobs import REPOSITORY, finished_run
from tests.helpers.nodes import INTERFACE, trouble, two_nodes, wait_for
from tests.helpers.resume import assert_same_result
from tests.helpers.tables import words
from tests.helpers.tools import called

pytestmark = pytest.mark.heavy

MORE = "--max_steps 40 --merge_every 9 --restart_warmup_steps 1 --save_steps 4"
PORT = "29511"
"""Used by nothing else: the nodes have a separate network."""
MISSED = ("lost contact with another rank", "not all ranks came within")
"""The message of a rank that cannot reach another one: in a collective of training, and
at a check."""


@pytest.fixture(scope="module")
def reference(user, tmp_path_factory):
    return finished_run(2, user, tmp_path_factory, MORE)


@pytest.fixture
def nodes():
    if reason := trouble():
        pytest.skip(reason)
    with two_nodes() as pair:
        yield pair


def command(how, node, folder, flags):
    of_program = "--nnodes 2 --nproc_per_node 1"
    if how == "deepspeed":
        hosts = folder / "hosts"
        hosts.write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
        of_program = f"--hostfile {hosts} --no_ssh"
    of_node = f"--node_rank {node} --master_addr 10.77.0.1 --master_port {PORT}"
    return words(program(how), of_program, of_node, SCRIPT, *flags)


SCRIPT = REPOSITORY / "launch/pretrain.py"


def program(name):
    """A program that is installed next to the Python of the tests."""
    return Path(sys.executable).with_name(name)


def start(how, nodes, folder, flags, of_second=()):
    """Token caches are each node's own. `of_second`: further flags of the second
    node."""
    started = []
    for number, node in enumerate(nodes):
        own_flags = [*flags, "--cache_dir", folder / f"cache{number}"]
        if number == 1:
            own_flags += of_second
        line = command(how, number, folder, own_flags)
        started.append(node.start(line, folder / f"log{number}"))
    return started


def log_of(folder):
    """The output of both nodes."""
    return "".join(
        f"-- node {number}\n{(folder / f'log{number}').read_text()}"
        for number in (0, 1)
    )


def codes_of(processes, folder, within_s):
    try:
        return [process.wait(timeout=within_s) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"a node goes on after {within_s} s:\n{log_of(folder)}")


def finish(processes, folder):
    assert codes_of(processes, folder, within_s=200) == [0, 0], log_of(folder)


def assert_ends_soon(processes, folder):
    """A run that has lost a node must not wait for its half hour."""
    began = time.monotonic()
    codes = codes_of(processes, folder, within_s=90)
    text = log_of(folder)
    assert 0 not in codes, text
    assert time.monotonic() - began < 60, text
    assert any(message in text for message in MISSED), text


@pytest.mark.parametrize("how", ["deepspeed", "torchrun"])
def test_two_nodes_are_one_run(user, reference, nodes, tmp_path, out, how):
    finish(start(how, nodes, tmp_path, user.flags(out, MORE)), tmp_path)
    assert_same_result(out, reference)


def test_the_ssh_launcher_makes_one_run_of_two_nodes(
    user, reference, nodes, tmp_path, out
):
    """Everything of DeepSpeed's but the connection; a node gets what it needs to know from
    .deepspeed_env alone.
    """
    programs = remote_shell.install(tmp_path / "bin")
    (tmp_path / "hosts").write_text(
        "10.77.0.1 slots=1\n10.77.0.2 slots=1\n10.77.0.9 slots=1\n"
    )
    (tmp_path / ".deepspeed_env").write_text(
        f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\nHF_HUB_OFFLINE=1\n"
    )
    holders = ",".join(f"{node.address}={node.holder}" for node in nodes)
    launcher = program("deepspeed")
    hosts = f"--hostfile {tmp_path}/hosts --exclude 10.77.0.9 --master_port {PORT}"
    outside = {
        "PATH": f"{programs}:{launcher.parent}:{os.environ['PATH']}",
        remote_shell.NODES: holders,
    }
    done = called(
        words(launcher, hosts, SCRIPT, *user.flags(out, MORE)),
        env={**os.environ, **outside},
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_result(out, reference)


def test_a_cut_cable_ends_the_run_and_it_goes_on_afterwards(user, nodes, tmp_path, out):
    """At the end in a folder that the second node has mounted in another place."""
    flags = user.flags(
        out, MORE, "--collective_timeout_s 20 --resume_from_checkpoint auto"
    )
    processes = start("deepspeed", nodes, tmp_path, [*flags, "--max_steps", "5000"])
    wait_for(out / "checkpoints/step-000004", processes)
    nodes[1].unplug()
    assert_ends_soon(processes, tmp_path)
    nodes[1].run("ip", "link", "set", INTERFACE, "up")
    step = max(step_of(folder) for folder in complete_checkpoints(out / "checkpoints"))
    last = ["--max_steps", str(step + 2)]
    elsewhere = tmp_path / "mounted"
    elsewhere.mkdir()
    nodes[1].run("mount", "--bind", out, elsewhere)
    # So that it is not in its first place too
    nodes[1].run("mount", "-t", "tmpfs", "none", out)
    finish(
        start(
            "deepspeed",
            nodes,
            tmp_path,
            [*flags, *last],
            of_second=["--output_dir", elsewhere],
        ),
        tmp_path,
    )
