"""What `topology` relies on in DeepSpeed. A failure here after an upgrade says which symbol moved."""

from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups

from mora_ds.common.errors import UserError
from mora_ds.engine.shards import _parameters
from mora_ds.parallel.topology import Topology
from tests.helpers.gloo import run_ranks
from tests.helpers.tensor_parallel import start

CASE = {"family": "llama", "train_norms": True}


def places() -> dict[str, Any]:
    topology = Topology.of(2)
    shard = torch.arange(2 + topology.index) + 10 * topology.index  # uneven shares of 5
    whole = topology.gather(shard.float(), 5)
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
        "whole": whole.tolist(),
        "scattered": scattered.tolist(),
        "other": message,
    }


def test_consecutive_ranks_are_a_group() -> None:
    for result in run_ranks(4, places):
        first = result["rank"] // 2 * 2
        assert result["group"] == [first, first + 1]
        assert result["replicas"] == [result["rank"] % 2, result["rank"] % 2 + 2]
        assert result["whole"] == [0, 1, 10, 11, 12]
        assert result["scattered"] == ([1, 3] if result["rank"] % 2 == 0 else [5, 7, 9])
        assert "this process has groups of 2 already" in result["other"]


def engine_facts() -> list[str]:
    engine, _, _ = start(CASE, 2, said_by_config=True)
    square = engine.module.model.layers[0].self_attn.q_proj.square
    norm = engine.module.model.layers[0].input_layernorm.weight
    rank = dist.get_rank()
    facts = {
        "no mpu.initialize_sequence_parallel": not hasattr(groups, "initialize_sequence_parallel"),
        "is_model_parallel_parameter": is_model_parallel_parameter(square) and not is_model_parallel_parameter(norm),
        "engine.mpu": engine.mpu is groups,
        "mpu.get_tensor_model_parallel_rank": engine.mpu.get_tensor_model_parallel_rank() == rank % 2,
        "mpu.get_tensor_model_parallel_world_size": engine.mpu.get_tensor_model_parallel_world_size() == 2,
        "optimizer.model_parallel_group": engine.optimizer.model_parallel_group is groups.get_model_parallel_group(),
        "squares are partitioned over the replicas": dist.get_world_size(square.ds_process_group) == 2,
        "a rank's share of a square": square.ds_numel == 8 * 16 and square.ds_tensor.numel() == 64,
        "AutoTP is off": engine.autotp_size() in (0, 1),
        "one rank of a group saves the norms": all(
            parameter.is_saved is (rank % 2 == 0 or "square" in parameter.name)
            for parameter in _parameters(engine).values()
        ),
    }
    return [name for name, holds in facts.items() if not holds]


def test_what_an_engine_makes_of_it() -> None:
    for wrong in run_ranks(4, engine_facts):
        assert wrong == [], f"no longer so in DeepSpeed {version('deepspeed')}: {wrong}"
