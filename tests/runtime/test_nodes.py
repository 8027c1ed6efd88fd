"""A run whose nodes do not see the same output folder is refused, on all ranks, before it
has begun.
"""

import os
import platform
from pathlib import Path

import pytest
import torch.distributed as dist

from mora_ds.common import files
from mora_ds.common.errors import RunError
from mora_ds.runtime.nodes import write_on_rank0
from mora_ds.runtime.ranks import Ranks
from tests.helpers.gloo import RankFailed, run_ranks
from tests.helpers.jobs import job, output_of, refused


def refused_on_two_nodes(argv, second_folder):
    """A run in which rank 2 is another node, on whose disk the output folder is `other`.
    For `run_ranks`.
    """
    files.VISIBLE_WITHIN_S = 0.5
    if dist.get_rank() == 2:
        os.environ["LOCAL_RANK"] = "0"
        platform.node = lambda: "node-b"
        argv = [*argv, "--output_dir", second_folder]
    else:
        platform.node = lambda: "node-a"
    return refused(argv)


@pytest.mark.parametrize(
    "more", [(), ("--resume_from_checkpoint", "auto")], ids=["new", "resumed"]
)
def test_both_nodes_and_the_folder_are_named(user, tmp_path, more):
    argv = user.flags(tmp_path / "first", *more)
    local = tmp_path / "other"
    local.mkdir()
    (local / "mine").touch()
    errors = set(run_ranks(3, refused_on_two_nodes, argv, str(local)))
    ((kind, message),) = errors
    assert kind == "UserError"
    assert message == (
        f"--output_dir: {local} on node-b (rank 2) is another folder than {output_of(argv)} on node-a (rank 0): name "
        "one on storage that all nodes share"
    )
    assert not (tmp_path / "first").exists()
    assert [path.name for path in local.iterdir()] == ["mine"]


def written_elsewhere(folder):
    """The error of a rank, where rank 1's node shows the files of rank 0 too late."""
    files.VISIBLE_WITHIN_S = 0.5
    ranks = Ranks.current()
    seen = Path(folder, "of node 1") if ranks.rank else Path(folder)

    def write():
        (seen / "tokenizer.json").write_text("{}")

    try:
        write_on_rank0(ranks, "tokenizer", seen, write)
    except RunError as error:
        return str(error)
    raise AssertionError("rank 1 saw the file")


def test_a_file_that_a_node_does_not_see_is_a_failure_of_the_run(tmp_path):
    """No mistake of the user's, whose code 2 would end a job of Slurm."""
    for message in run_ranks(2, written_elsewhere, str(tmp_path)):
        assert message.startswith(
            f"rank 1: {tmp_path}/of node 1/tokenizer.json is missing on "
        )
        assert "after another rank has written it" in message


def merging_with_a_late_cycle(argv, times):
    """A run in which rank 1 finds no cycle of the ledger the first `times` that it looks."""
    files.VISIBLE_WITHIN_S = 1.0
    left = [times if dist.get_rank() else 0]
    original = files.file_problem

    def problem(path, size, sha256):
        if path.name.startswith("cycle-") and left[0]:
            left[0] -= 1
            return f"{path} is missing"
        return original(path, size, sha256)

    files.file_problem = problem
    return job(argv)["merges"]


def test_a_cycle_that_comes_late_is_waited_for(user, out):
    argv = user.flags(out, "--max_steps 4 --merge_every 2 --restart_warmup_steps 1")
    assert run_ranks(2, merging_with_a_late_cycle, argv, 3)[0] == 1


def test_a_cycle_that_does_not_come_is_a_failure_of_the_run(user, out):
    argv = user.flags(out, "--max_steps 4 --merge_every 2 --restart_warmup_steps 1")
    with pytest.raises(RankFailed, match=r"RunError.*cycle-00000.* is missing on"):
        run_ranks(2, merging_with_a_late_cycle, argv, 1_000_000)
