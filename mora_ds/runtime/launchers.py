"""What srun and mpirun tell a process about its rank, as the variables of torchrun and
DeepSpeed's launcher: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT.

    mpirun of Open MPI      OMPI_COMM_WORLD_*                     its manual, "Environment variables"
    mpirun of MPICH, Intel  PMI_RANK, PMI_SIZE, MPI_LOCAL*        mpich, src/pm/hydra/proxy/pmip_cb.c
    srun                    SLURM_PROCID and others               its manual, "Output environment variables"

srun names the nodes, so that rank 0 can be found. mpirun does not: with several nodes
MASTER_ADDR must be given.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mora_ds.common.errors import UserError

VALUES = (
    "hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_port", "master_addr", "node_rank", "launcher",
    "launcher_args", "ssh_port", "bind_core_list",
)  # fmt: skip
"""Flags with a value of DeepSpeed's launcher that `mora-ds pretrain` passes on."""

SWITCHES = ("no_ssh", "force_multi", "bind_cores_to_rank")

PORT = 29500
"""The default of torchrun and DeepSpeed."""

FIRST_PORT = 15_000
PORTS = 10_000
"""Ports of Slurm's jobs lie below those that Linux gives to outgoing connections, which
begin at 32768 (net.ipv4.ip_local_port_range)."""


@dataclass(frozen=True)
class Launcher:
    """The names of a launcher's variables."""

    rank: str
    world: str
    local_rank: str
    local_world: str
    command: str = ""
    """The start of a command that gives all processes MASTER_ADDR."""


OPEN_MPI = Launcher(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "mpirun -x MASTER_ADDR -x MASTER_PORT ...",
)
MPICH = Launcher(
    "PMI_RANK",
    "PMI_SIZE",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "mpirun ...",
)
SLURM = Launcher(
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_TASKS_PER_NODE",
)
LAUNCHERS = (OPEN_MPI, MPICH, SLURM)
"""In this order: within a job of Slurm mpirun starts its daemons by srun, and their
variables reach its processes."""


def adopt(argv: Iterable[str] = ()) -> None:
    """Set the variables of this process's rank where srun or mpirun has started it as
    one of several, and nothing has set RANK.

    Does nothing if `argv` has a flag of DeepSpeed's launcher, which then starts the
    ranks. Raises `UserError` with the lines to add where something is not known.
    """
    flags = {word.partition("=")[0].lstrip("-") for word in argv}
    if "RANK" in os.environ or not flags.isdisjoint((*VALUES, *SWITCHES)):
        return
    several = [known for known in LAUNCHERS if _number(known.world, 1) > 1]
    if not several:
        return
    complete = [known for known in several if known.local_rank in os.environ]
    if not complete:
        raise UserError(_what_is_missing(several[0], "LOCAL_RANK"))
    launcher = complete[0]
    variables = {
        "RANK": os.environ[launcher.rank],
        "WORLD_SIZE": os.environ[launcher.world],
        "LOCAL_RANK": os.environ[launcher.local_rank],
        "LOCAL_WORLD_SIZE": str(_local_world(launcher)),
    }
    if launcher is SLURM:
        variables |= _slurm_address()
    elif variables["LOCAL_WORLD_SIZE"] == variables["WORLD_SIZE"]:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}
    elif "MASTER_ADDR" not in os.environ:
        raise UserError(_what_is_missing(launcher, "MASTER_ADDR"))
    else:
        variables["MASTER_PORT"] = str(PORT)
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def other_port() -> str:
    """How to give the run another port, for a message."""
    if is_slurm():
        return (
            "the next attempt of launch/slurm.sbatch takes another port; without that script export another "
            "MASTER_PORT"
        )
    by_mpi = any(known.rank in os.environ for known in (OPEN_MPI, MPICH))
    if by_mpi and "TORCHELASTIC_RUN_ID" not in os.environ:
        return "export another MASTER_PORT"
    return "give this run another port with --master_port"


def is_slurm() -> bool:
    """Whether srun has started this rank itself, without another launcher."""
    names = ("CROSS_RANK", "TORCHELASTIC_RUN_ID", OPEN_MPI.rank)
    others = any(name in os.environ for name in names)
    return not others and os.environ.get(SLURM.rank) == os.environ.get("RANK", "")


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _local_world(launcher: Launcher) -> int:
    """Number of ranks on this node. srun tells it of every node, as "2(x3),1"."""
    if launcher is not SLURM:
        return _number(launcher.local_world, 1)
    counts: list[int] = []
    for part in os.environ[launcher.local_world].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[_number("SLURM_NODEID", 0)]


def _slurm_address() -> dict[str, str]:
    """Where rank 0 is: on the first node of the step, such as gpu01 of
    "gpu[01-03,07],login"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", os.environ["SLURM_STEP_NODELIST"])
    assert first is not None, "a step has a node"
    step = _number("SLURM_JOB_ID", 0) * 31 + _number("SLURM_STEP_ID", 0)
    return {
        "MASTER_ADDR": re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]),
        "MASTER_PORT": str(FIRST_PORT + step % PORTS),
    }


def _what_is_missing(launcher: Launcher, name: str) -> str:
    if name == "MASTER_ADDR":
        return (
            f"{launcher.rank} is set, MASTER_ADDR is not, and this run has several nodes: name the first of them\n"
            f"  export MASTER_ADDR=NODE MASTER_PORT={PORT}\n  {launcher.command}"
        )
    return (
        f"{launcher.rank} is set, and nothing tells which process of its node this is: start the run with torchrun, "
        "or set for each process\n"
        f"  export RANK=${launcher.rank} WORLD_SIZE=${launcher.world} LOCAL_RANK=...\n"
        f"  export MASTER_ADDR=NODE MASTER_PORT={PORT}"
    )
