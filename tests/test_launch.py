"""launch/: Slurm's script with stand-ins for Slurm's commands; what Kubernetes and SkyPilot
start, parsed.
"""

import os
import re
import shlex
import signal
import socket
from pathlib import Path
from string import Template

import pytest
import yaml
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

from mora_ds.config.arguments import parse
from mora_ds.engine.launcher import check_connections, launcher_flags
from mora_ds.runtime.signals import EXIT_STOPPED, SIGNALS
from tests.helpers.tables import each_row, parsed
from tests.helpers.tools import called

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
GPUS = 8
NODES = 2

STAND_INS = {
    "scontrol": (
        'case "$1 $2" in\n'
        '"show hostnames") printf "node1\\nnode2\\n" ;;\n'
        '"show job") printf "   %s\\n   Command=%s recipe.yaml\\n" "$STATE" "$SCRIPT" ;;\n'
        '*) echo "$@" >> "$LOG" ;;\n'
        "esac"
    ),
    "srun": (
        "read -r _ _ _ script _ < /proc/$PPID/stat\n"
        'for signal in $SIGNALS; do kill -s "$signal" $script; done\n'
        'echo "srun cpus=$SRUN_CPUS_PER_TASK $1" >> "$LOG"\n'
        "while [[ $1 == --* ]]; do shift; done\n"
        'SLURM_PROCID=9 "$@"'
    ),
    "scancel": 'echo "scancel $@" >> "$LOG"',
    # 1: while the ranks run; longer: between two attempts
    "sleep": '[ "$1" = 1 ] || { [ -n "$IN_SLEEP" ] && kill -s "$IN_SLEEP" $PPID; }',
    "python": (
        'echo "task $SLURM_PROCID at $MASTER_ADDR:$MASTER_PORT: $*" >> "$LOG"\n'
        'echo "gloo=$GLOO_SOCKET_IFNAME triton=$TRITON_CACHE_DIR" >> "$LOG"\n'
        'exit "$CODE"'
    ),
}


def sbatch(folder, code, **environment):
    """The exit code of the script and the log of the stand-ins, when every rank ends
    with a code."""
    for name, script in STAND_INS.items():
        stand_in = folder / name
        stand_in.write_text(f"#!/bin/bash\n{script}\n")
        stand_in.chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "16",
        "SLURM_CPUS_PER_TASK": "12",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_USER": "me",
    }
    log = folder / "log"
    log.write_text("")
    stand_ins = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        "LOG": str(log),
        "SCRIPT": str(LAUNCH / "slurm.sbatch"),
        "STATE": "JobState=RUNNING Reason=None",
    }
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "recipe.yaml"]
    settings = {**slurm, **stand_ins, "CODE": str(code), **environment}
    done = called(command, env=settings)
    return done.returncode, [*log.read_text().splitlines(), *done.stderr.splitlines()]


def test_slurm_starts_every_rank_with_its_cores_and_a_cache_of_its_node(tmp_path):
    """From another folder than the checkout, and under `sbatch --export=NONE`."""
    code, log = sbatch(tmp_path, 0, NCCL_SOCKET_IFNAME="ib0")
    assert code == 0
    script = f"{LAUNCH}/../launch/pretrain.py"
    assert log == [
        "srun cpus=12 --export=ALL",
        f"task 9 at node1:15217: -u {script} recipe.yaml --resume_from_checkpoint auto",
        "gloo=ib0 triton=/tmp/triton-me",
    ]
    chosen = {"GLOO_SOCKET_IFNAME": "eth0", "TRITON_CACHE_DIR": "/local"}
    _, log = sbatch(tmp_path, 0, NCCL_SOCKET_IFNAME="ib0", **chosen)
    assert log[-1] == "gloo=eth0 triton=/local"


ENDS = """
# done, a mistake, a failure that is not fatal
0 | "" | Reason=None | 0 | 1 | no
2 | "" | Reason=None | 2 | 1 | no
3 | "" | Reason=None | 3 | 1 | no
# a dead rank, a full disk
137 | "" | Reason=None | 137 | 3 | no
1 | "" | Reason=None | 1 | 3 | no
# the time is nearly up; USR1 comes before Python; the disk is full
75 | USR1 | JobState=RUNNING Reason=None | 75 | 1 | yes
138 | USR1 | JobState=RUNNING Reason=None | 138 | 1 | yes
1 | USR1 | JobState=RUNNING Reason=None | 1 | 1 | no
# the time limit
75 | TERM | JobState=COMPLETING Reason=TimeLimit | 75 | 1 | yes
75 | USR1 TERM | JobState=COMPLETING Reason=TimeLimit | 75 | 1 | yes
137 | TERM | JobState=COMPLETING Reason=TimeLimit | 137 | 1 | no
# preemption, with and without time to save
75 | "" | JobState=RUNNING Reason=None PreemptTime=2026-01-01T00:00:00 | 75 | 1 | yes
75 | TERM | JobState=PREEMPTED Reason=None PreemptTime=None | 75 | 1 | yes
# scancel; in the save before the time limit; --signal=USR1, TERM or INT
75 | TERM | JobState=COMPLETING Reason=None PreemptTime=None | 75 | 1 | no
75 | USR1 TERM | JobState=COMPLETING Reason=None | 75 | 1 | no
1 | TERM | JobState=COMPLETING Reason=None | 1 | 1 | no
75 | "" | JobState=RUNNING Reason=None | 75 | 1 | no
# a node has died: Slurm queues the job itself
75 | TERM | JobState=NODE_FAIL Reason=NodeDown | 75 | 1 | no
"""
"""Code of the ranks | signals to the script | the job as Slurm shows it | code of the script,
starts, requeued.
"""


@each_row("code, to_script, state, left_with, starts, requeued", ENDS)
def test_slurm_queues_the_job_again_unless_a_person_ended_it(
    tmp_path, code, to_script, state, left_with, starts, requeued
):
    sent = to_script.replace('"', "")
    end, log = sbatch(tmp_path, code, RESTARTS="2", SIGNALS=sent, STATE=state)
    assert end == int(left_with)
    assert sum(line.startswith("srun") for line in log) == int(starts)
    assert ("requeue 7" in log) == (requeued == "yes")
    # The ranks get what the script gets
    assert ("scancel --signal=USR1 7" in log) == bool(sent)


@pytest.mark.parametrize("number, requeued", [("USR1", True), ("TERM", False)])
def test_a_signal_between_two_attempts_is_heeded(tmp_path, number, requeued):
    end, log = sbatch(tmp_path, 1, IN_SLEEP=number)
    assert end == 75
    assert sum(line.startswith("srun") for line in log) == 1
    assert ("requeue 7" in log) == requeued


def test_every_attempt_has_a_port_of_its_own_that_is_free(tmp_path):
    with socket.create_server(("127.0.0.1", 15_217)):
        _, log = sbatch(tmp_path, 1, RESTARTS="2")
    ports = [int(port) for port in re.findall(r"at node1:(\d+)", "\n".join(log))]
    assert ports == [15_218, 16_214, 17_211]
    assert max(ports) < 32_768, "below the ports of outgoing connections"


REFUSED = """
{SLURM_ARRAY_JOB_ID: "7"} | leave --array out
{SLURM_HET_SIZE: "2"} | one kind of node
{PYTHON: /nowhere/python} | no Python at /nowhere/python: make .venv .* export PYTHON
{SCRIPT: /spool/job7} | export MORA_DS=CHECKOUT
"""


@each_row("environment, message", REFUSED)
def test_what_slurm_cannot_start_is_named(tmp_path, environment, message):
    code, log = sbatch(tmp_path, 0, **parsed(environment))
    assert code == 2
    assert re.search(f"^slurm.sbatch: .*{message}", log[-1])
    assert not any(line.startswith("srun") for line in log)


@pytest.mark.parametrize("name", ["MORA_DS", "SLURM_SUBMIT_DIR"])
def test_a_copy_of_the_script_finds_the_checkout(tmp_path, name):
    code, log = sbatch(tmp_path, 0, SCRIPT="/home/me/mine.sbatch", **{name: str(ROOT)})
    assert code == 0
    assert f" -u {ROOT}/launch/pretrain.py" in log[1]


def started(words):
    """The command line as torchrun parses it, and the rest as mora_ds parses it."""
    options = get_args_parser().parse_args(words)
    flags = options.training_script_args
    return options, parse(flags[1:] if options.module else flags)


def check(options, arguments):
    assert options.master_port == 29500
    assert arguments.training.resume_from_checkpoint == "auto"
    assert arguments.training.output_dir == "/shared/out"
    assert arguments.adapter.mora_rank == 8


def jobset_nodes():
    """The JobSet, and the part of it that is a Job."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    return jobset, job["template"]["spec"]


def test_kubernetes_starts_a_process_a_gpu(tmp_path):
    jobset, nodes = jobset_nodes()
    assert (jobset["apiVersion"], jobset["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    assert nodes["parallelism"] == nodes["completions"] == NODES
    assert nodes["completionMode"] == "Indexed"
    pod = nodes["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == GPUS
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    names = {variable["name"] for variable in container["env"]}
    assert names >= {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TRITON_CACHE_DIR"}

    program = tmp_path / "mora-ds"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "JOB_COMPLETION_INDEX": "1",
    }
    done = called([*container["command"], *container["args"]], env=environment)
    command, *words = done.stdout.splitlines()
    assert command == "pretrain"
    for_launcher, flags = launcher_flags(words)
    check_connections(for_launcher)
    options = runner.parse_args([*for_launcher, "mora_ds"])
    assert runner.fetch_hostfile(options.hostfile) == {
        f"node{number}": GPUS for number in range(NODES)
    }
    assert (options.no_ssh, options.node_rank) == (True, 1)
    # JobSet's names of pods: SET-JOB-INDEX-POD, in the set's own domain
    name = jobset["metadata"]["name"]
    job = jobset["spec"]["replicatedJobs"][0]["name"]
    assert options.master_addr == f"{name}-{job}-0-0.{name}"
    check(options, parse(flags))


RESTARTS = """
- {name: saved, action: RestartJobSetAndIgnoreMaxRestarts, onJobFailureReasons: [PodFailurePolicy]}
"""
ENDS_OF_PODS = f"""
- {{action: FailJob, onExitCodes: {{operator: In, values: [{EXIT_STOPPED}]}}}}
- {{action: FailJob, onPodConditions: [{{type: DisruptionTarget, status: "True"}}]}}
"""


def test_a_restart_of_kubernetes_counts_unless_the_ranks_had_to_stop():
    """Pods of the same preemption: the one that Kubernetes ends, and those whose ranks save
    with it. JobSet sees the reason alone."""
    jobset, nodes = jobset_nodes()
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"] == parsed(RESTARTS)
    assert nodes["podFailurePolicy"]["rules"] == parsed(ENDS_OF_PODS)
    assert nodes["backoffLimit"] == 0, "every other failure is one of its own"


def test_skypilot_starts_a_process_a_gpu(monkeypatch):
    monkeypatch.chdir(ROOT)
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["num_nodes"] == NODES
    assert task["resources"]["accelerators"].endswith(f":{GPUS}")
    *_, command = task["run"].replace("\\\n", " ").strip().splitlines()
    variables = {
        "SKYPILOT_NUM_NODES": NODES,
        "SKYPILOT_NUM_GPUS_PER_NODE": GPUS,
        "SKYPILOT_NODE_RANK": 1,
        "head": "10.0.0.1",
    }
    torchrun, *words = shlex.split(
        Template(command).substitute({**variables, **task["envs"]})
    )
    options, arguments = started(words)
    check(options, arguments)
    assert int(options.nnodes) == NODES
    assert int(options.nproc_per_node) == GPUS
    assert "apt-get update && sudo apt-get install" in task["setup"]
    assert torchrun == ".venv/bin/torchrun"
    assert (ROOT / options.training_script).is_file()
    assert options.master_addr == "10.0.0.1"


def test_the_image_has_what_kernels_and_experts_need():
    text = (ROOT / "Dockerfile").read_text()
    (version,) = re.findall(r"IMAGE=pytorch/pytorch:(\d+)\.(\d+)", text)
    # For torch's grouped products (adapters/ops/grouped.py)
    assert tuple(map(int, version)) >= (2, 10)
    assert "check_compiler()" in text


def test_the_image_is_not_roots_and_stops_with_its_ranks():
    """`docker stop` sends the signal to process 1, which is `mora-ds`."""
    text = (ROOT / "Dockerfile").read_text()
    instructions = dict(re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE))
    assert instructions["USER"].split(":")[0] not in ("root", "0")
    assert signal.Signals[instructions["STOPSIGNAL"]] in SIGNALS
    assert instructions["ENTRYPOINT"] == '["mora-ds"]'
    assert "--stop-timeout" in text
    # Debian's and Ubuntu's Python
    assert "PIP_BREAK_SYSTEM_PACKAGES=1 pip install" in text


def test_the_image_is_built_from_the_sources_alone():
    text = (ROOT / "Dockerfile").read_text()
    copied = set()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        copied.update(line.split()[:-1])
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in sent, "nothing but what is named"
    assert {line[1:] for line in sent if line.startswith("!")} == copied
