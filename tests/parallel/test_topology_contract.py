"""What `topology` gathers, sums and names, against the groups of DeepSpeed that it reads."""

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from mora_ds.common.errors import UserError
from mora_ds.parallel.topology import Topology
from tests.helpers.gloo import run_ranks


def places():
    topology = Topology.of(2)
    shard = torch.arange(2 + topology.index) + 10 * topology.index  # uneven shares of 5
    full = topology.gather(shard.float(), 5)
    scattered = topology.sum_scatter(torch.arange(5.0) + topology.index)
    try:
        Topology.of(4)
        message = ""
    except UserError as error:
        message = str(error)
    return {
        "rank": dist.get_rank(),
        "group": dist.get_process_group_ranks(topology.group),
        "replicas": dist.get_process_group_ranks(groups.get_data_parallel_group()),
        "full": full.tolist(),
        "scattered": scattered.tolist(),
        "other": message,
    }


def test_consecutive_ranks_are_a_group():
    for result in run_ranks(4, places):
        first = result["rank"] // 2 * 2
        assert result["group"] == [first, first + 1]
        assert result["replicas"] == [result["rank"] % 2, result["rank"] % 2 + 2]
        assert result["full"] == [0, 1, 10, 11, 12]
        assert result["scattered"] == ([1, 3] if result["rank"] % 2 == 0 else [5, 7, 9])
        assert "this process has groups of 2 already" in result["other"]
