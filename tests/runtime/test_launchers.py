"""The variables of srun and mpirun, as those of a launcher."""

import os

import pytest

from mora_ds.runtime import launchers
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed, rows

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_GTIDS": "2,3",
    "SLURM_STEP_NODELIST": "gpu[07-08,12],login",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
}
DAEMONS_OF_MPIRUN = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
RANK = ["3", "4", "1", "2"]
"""RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE."""


@pytest.fixture
def adopted(monkeypatch):
    """The variables that a process has after `adopt`, started with those given."""

    def adopted(given, argv=()):
        monkeypatch.setattr(os, "environ", dict(given))
        launchers.adopt(argv)
        names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
        return [os.environ.get(name) for name in names.split()]

    return adopted


def test_srun_tells_all_that_is_needed(adopted):
    port = str(15_000 + (7 * 31 + 2) % 10_000)
    assert adopted(SLURM) == [*RANK, "gpu07", port]
    assert int(port) < 32_768, "below the ports of outgoing connections"
    by_hand = {"MASTER_ADDR": "ib-gpu07", "MASTER_PORT": "15001"}
    assert adopted({**SLURM, **by_hand}) == [*RANK, "ib-gpu07", "15001"]
    # `srun --mpi=pmi2`
    assert adopted({**SLURM, "PMI_RANK": "3", "PMI_SIZE": "4"})[:4] == RANK


NODES = """
node1 | node1
node1,node2 | node1
gpu[07-08,12],login | gpu07
rack[1-2]gpu[03,05] | rack1gpu03
"""


@each_row("nodes, first", NODES)
def test_rank_0_is_on_the_first_node(adopted, nodes, first):
    assert adopted({**SLURM, "SLURM_STEP_NODELIST": nodes})[4] == first


@pytest.mark.parametrize("given", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpirun_tells_all_but_where_rank_0_is(adopted, given):
    with user_error(r"_RANK is set, and MASTER_ADDR not:(.|\n)*mpirun -x MASTER"):
        adopted(given)
    address = {"MASTER_ADDR": "node1"}
    assert adopted({**given, **address}) == [*RANK, "node1", "29500"]
    # Its daemons are tasks of srun
    inside = {**DAEMONS_OF_MPIRUN, **given, **address}
    assert adopted(inside) == [*RANK, "node1", "29500"]


@pytest.mark.parametrize("given", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_on_one_node_mpirun_needs_nothing_more(adopted, given):
    on_node = [name for name in given if "LOCAL" in name and name.endswith("S")]
    count = on_node or ["OMPI_COMM_WORLD_LOCAL_SIZE"]
    here = ["3", "4", "1", "4", "127.0.0.1", "29500"]
    assert adopted({**given, count[0]: "4"}) == here


def test_what_nothing_tells_is_to_be_exported(adopted):
    with user_error("PMI_RANK is set, and LOCAL_RANK and MASTER_ADDR not"):
        adopted({"PMI_RANK": "3", "PMI_SIZE": "4"})


ALONE = """
{}
{SLURM_STEP_NUM_TASKS: "1", SLURM_PROCID: "0"}
{SLURM_NTASKS: "4", SLURM_PROCID: "0"}
{OMPI_COMM_WORLD_SIZE: "1"}
"""
"""Started by hand, in the script of a job, or as the only task."""


@pytest.mark.parametrize("given", [row[0] for row in rows(ALONE)])
def test_a_process_that_is_not_one_of_several_stays_alone(adopted, given):
    assert adopted(parsed(given)) == [None] * 6


def test_another_launcher_comes_first(adopted):
    assert adopted({**SLURM, "RANK": "0"})[:2] == ["0", None]
    flags = "recipe.yaml --hostfile hosts --no_ssh --node_rank=1"
    assert adopted(SLURM, flags.split()) == [None] * 6


REMEDIES = """
{CROSS_RANK: "0", RANK: "0"} | with --master_port
{TORCHELASTIC_RUN_ID: x, RANK: "0", SLURM_PROCID: "0"} | with --master_port
{SLURM_PROCID: "3", RANK: "3"} | next attempt of launch/slurm.sbatch takes another port
{OMPI_COMM_WORLD_RANK: "3", RANK: "3"} | export another MASTER_PORT
{PMI_RANK: "3", RANK: "3"} | export another MASTER_PORT
"""
"""Variables | the remedy for a port that is taken."""


@each_row("given, remedy", REMEDIES)
def test_the_remedy_is_that_of_the_launcher_in_use(monkeypatch, given, remedy):
    monkeypatch.setattr(os, "environ", parsed(given))
    assert remedy in launchers.other_port()
    assert launchers.is_slurm() == ("sbatch" in remedy)
