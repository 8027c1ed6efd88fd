"""launch/: Slurm's script with stand-ins for Slurm's commands; what Kubernetes and SkyPilot
start, parsed.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from string import Template

import pytest
import yaml
from torch.distributed.run import get_args_parser

from mora_ds.config.arguments import parse

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
GPUS = 8
NODES = 2

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" >> "$LOG"; fi',
    "srun": (
        'echo "srun cpus=$SRUN_CPUS_PER_TASK" >> "$LOG"\n'
        'while [ "$1" != bash ]; do shift; done\n'
        'SLURM_PROCID=9 SLURM_LOCALID=1 "$@"'
    ),
    "scancel": 'echo "scancel $@" >> "$LOG"',
    "sleep": "",
    "python": (
        'echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE at $MASTER_ADDR: $*" >> "$LOG"\n'
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
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "12",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_USER": "me",
    }
    log = folder / "log"
    log.unlink(missing_ok=True)
    path = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": str(folder / "python"),
        "LOG": str(log),
    }
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "recipe.yaml"]
    settings = {**slurm, **path, "CODE": str(code), **environment}
    done = subprocess.run(command, env=settings, capture_output=True)
    return done.returncode, log.read_text().splitlines()


def test_slurm_starts_every_rank_with_its_cores_and_a_cache_of_its_node(tmp_path):
    code, log = sbatch(tmp_path, 0, NCCL_SOCKET_IFNAME="ib0")
    assert code == 0
    assert log == [
        "srun cpus=12",
        f"rank 9 of 16, 1 of 8 at node1: -u {LAUNCH}/pretrain.py recipe.yaml --resume_from_checkpoint auto",
        "gloo=ib0 triton=/tmp/triton-me",
    ]
    chosen = {"GLOO_SOCKET_IFNAME": "eth0", "TRITON_CACHE_DIR": "/local"}
    _, log = sbatch(tmp_path, 0, NCCL_SOCKET_IFNAME="ib0", **chosen)
    assert log[-1] == "gloo=eth0 triton=/local"


@pytest.mark.parametrize(
    ("code", "starts", "requeued"),
    [(2, 1, False), (3, 1, False), (75, 1, True), (1, 3, False)],
)
def test_slurm_starts_again_what_may_go_better(tmp_path, code, starts, requeued):
    left_with, log = sbatch(tmp_path, code, RESTARTS="2")
    assert left_with == code
    assert sum(line.startswith("srun") for line in log) == starts
    assert ("requeue 7" in log) == requeued


def started(words):
    """The command line as torchrun parses it, and the rest as mora_ds parses it."""
    options = get_args_parser().parse_args(words)
    flags = options.training_script_args
    return options, parse(flags[1:] if options.module else flags)


def check(options, arguments):
    assert int(options.nnodes) == NODES
    assert int(options.nproc_per_node) == GPUS
    assert options.master_port == 29500
    assert arguments.training.resume_from_checkpoint == "auto"
    assert arguments.training.output_dir == "/shared/out"
    assert arguments.adapter.mora_rank == 8


def test_kubernetes_starts_a_process_a_gpu():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    (job,) = jobset["spec"]["replicatedJobs"]
    nodes = job["template"]["spec"]
    assert nodes["parallelism"] == nodes["completions"] == NODES
    assert nodes["completionMode"] == "Indexed"
    pod = nodes["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == GPUS
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    names = {variable["name"] for variable in container["env"]}
    needed = "NODE_RANK GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME TRITON_CACHE_DIR"
    assert names >= {*needed.split()}
    words = [word.replace("$(NODE_RANK)", "1") for word in container["args"]]
    options, arguments = started(words)
    check(options, arguments)
    assert options.training_script_args[0] == "pretrain"
    assert options.training_script == "mora_ds"
    # JobSet's names of pods: SET-JOB-INDEX-POD, in the set's own domain
    name = jobset["metadata"]["name"]
    assert options.master_addr == f"{name}-{job['name']}-0-0.{name}"


def test_kubernetes_tells_the_ranks_to_save_before_it_tells_torchrun_to_end():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    *shell, hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    waited = re.search(r"sleep (\d+)$", hook)
    assert 30 < int(waited[1]) < pod["terminationGracePeriodSeconds"]
    rank = "trap 'exit 75' USR1; echo ready; while :; do sleep 0.05; done"
    launcher = subprocess.Popen(
        ["bash", "-c", f"bash -c {shlex.quote(rank)} & wait $!"], stdout=subprocess.PIPE
    )
    assert launcher.stdout.readline() == b"ready\n"
    subprocess.run(
        [
            *shell,
            hook.replace("/proc/1/", f"/proc/{launcher.pid}/").replace(waited[0], ""),
        ],
        check=True,
    )
    assert launcher.wait(10) == 75
    launcher.stdout.close()


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
    assert torchrun == ".venv/bin/torchrun"
    assert (ROOT / options.training_script).is_file()
    assert options.master_addr == "10.0.0.1"


def test_the_image_has_what_kernels_and_experts_need():
    text = (ROOT / "Dockerfile").read_text()
    (version,) = re.findall(r"IMAGE=pytorch/pytorch:(\d+)\.(\d+)", text)
    # For torch's grouped products (adapters/ops/grouped.py)
    assert tuple(map(int, version)) >= (2, 10)
    assert "check_compiler()" in text
