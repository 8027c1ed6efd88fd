"""A run whose nodes do not see the same output folder is refused, on all ranks, before it
has begun.
"""

import os
import platform

import pytest
import torch.distributed as dist

from mora_ds.common import files
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import output_of, refused


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
