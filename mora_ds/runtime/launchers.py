"""What srun and mpirun tell a process about its rank, as the variables of torchrun and
DeepSpeed's launcher.

srun names the nodes, so that rank 0 can be found. mpirun does not: with several nodes
MASTER_ADDR must be given.
"""

import os
import re
from collections.abc import Iterable

from mora_ds.common.errors import UserError

VALUES = (
    "hostfile", "include", "exclude", "num_nodes", "num_gpus", "master_port", "master_addr", "node_rank", "launcher",
    "launcher_args", "ssh_port", "bind_core_list",
)  # fmt: skip
"""Flags with a value of DeepSpeed's launcher that `mora-ds pretrain` passes on."""

SWITCHES = ("no_ssh", "force_multi", "bind_cores_to_rank")

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_GTIDS")
LAUNCHERS = (OPEN_MPI, MPICH, SLURM)
"""What they call `OURS`. In this order, because within a job of Slurm mpirun starts its
daemons by srun, and their variables reach its processes."""

PORT = "29500"
"""The default of torchrun and DeepSpeed."""

SLURM_PORTS = range(15_000, 25_000)
"""Below the ports that Linux gives to outgoing connections, from 32768 on
(net.ipv4.ip_local_port_range)."""


def adopt(argv: Iterable[str] = ()) -> None:
    """Set the variables of this process's rank where srun or mpirun has started it as
    one of several, and nothing has set RANK.

    Does nothing if `argv` has a flag of DeepSpeed's launcher, which then starts the
    ranks. Raises `UserError` with the lines to add where something is not known.
    """
    flags = {word.partition("=")[0].lstrip("-") for word in argv}
    if "RANK" in os.environ or not flags.isdisjoint((*VALUES, *SWITCHES)):
        return
    several = [names for names in LAUNCHERS if os.environ.get(names[1], "1") != "1"]
    if not several:
        return
    # srun --mpi=pmi2 sets the first two of MPICH's
    known = [names for names in several if names[2] in os.environ]
    names = (known or several)[0]
    values = {
        our: os.environ[their]
        for our, their in zip(OURS, names, strict=True)
        if their in os.environ
    }
    if names is SLURM:
        values |= _slurm_values()
    elif values.get("LOCAL_WORLD_SIZE") == values["WORLD_SIZE"]:
        values["MASTER_ADDR"] = "127.0.0.1"
    for name, value in {"MASTER_PORT": PORT, **values}.items():
        os.environ.setdefault(name, value)
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"{names[0]} is set, and {' and '.join(missing)} not: start the run with torchrun, or set what is missing "
            "for all processes\n"
            f"  export MASTER_ADDR=NODE_OF_RANK_0 MASTER_PORT={PORT}\n"
            "  mpirun -x MASTER_ADDR -x MASTER_PORT ..."
        )


def _slurm_values() -> dict[str, str]:
    """LOCAL_WORLD_SIZE, and where rank 0 is: on the first node of the step, such as gpu01
    of "gpu[01-03,07],login"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", os.environ["SLURM_STEP_NODELIST"])
    assert first is not None, "a step has a node"
    step = int(os.environ["SLURM_JOB_ID"]) * 31 + int(os.environ["SLURM_STEP_ID"])
    return {
        "LOCAL_WORLD_SIZE": str(len(os.environ["SLURM_GTIDS"].split(","))),
        "MASTER_ADDR": re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]),
        "MASTER_PORT": str(SLURM_PORTS[step % len(SLURM_PORTS)]),
    }


def is_slurm() -> bool:
    """Whether srun has started this rank itself, without another launcher."""
    return not _has_flags() and os.environ.get(SLURM[0]) == os.environ.get("RANK", "")


def other_port() -> str:
    """How to give the run another port, for a message."""
    if _has_flags():
        return "give this run another port with --master_port"
    by_script = "the next attempt of launch/slurm.sbatch takes another port; without that script "
    return f"{by_script if is_slurm() else ''}export another MASTER_PORT"


def _has_flags() -> bool:
    """Whether the launcher is DeepSpeed's or torchrun."""
    return not {"CROSS_RANK", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)
