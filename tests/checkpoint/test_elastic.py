"""An engine's state saved by two ranks is restored at one, three, four and two, under any
ZeRO stage, to the bit.

Complete runs: `test_elastic_runs`.
"""

from itertools import permutations
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mora_ds.checkpoint import shard_table
from mora_ds.checkpoint.shard_table import EngineShards, RankShard, rank_tensors
from mora_ds.common.errors import UserError
from mora_ds.common.tensor_files import write_safetensors
from mora_ds.engine import shards as shard_module
from mora_ds.engine import zero
from mora_ds.engine.shards import MASTER
from mora_ds.engine.zero import view_of
from mora_ds.runtime.exchange import gather_to_rank0
from mora_ds.runtime.ranks import Ranks
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.pool import run_pooled
from tests.helpers.resume import assert_same_tensors
from tests.helpers.tables import heavy

COMBINATIONS = [
    (stage, dtype)
    for stage in (1, 2, 3)
    for dtype in ("float32", "bfloat16", "float16")
]
"""(ZeRO stage, dtype) of every engine that `new_engine` builds."""
MOMENTS = ["exp_avg", "exp_avg_sq"]
COUNTERS = {"global_steps": 3, "global_samples": 12, "skipped_steps": 2}
SCALER = {
    "cur_scale": 128.0,
    "cur_iter": 5,
    "last_overflow_iter": 1,
    "cur_hysteresis": 1,
}
"""What an engine counts, and what fp16's loss scaler has, when it is saved."""


class Small(nn.Module):
    """Two parameters of sizes that two ranks cannot share evenly, and one buffer."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(5, 5).to(dtype))
        self.second = nn.Parameter(torch.randn(7).to(dtype))
        self.register_buffer("base", torch.randn(5, 7), persistent=False)

    def forward(self, x):
        y = (x @ self.first) @ self.base.to(x.dtype) * self.second + 1
        return y.float().square().mean()


def new_engine(stage, dtype):
    """Plain `deepspeed.initialize`: what DeepSpeed does by itself. Small parameters
    persist, as by default.
    """
    model = Small(getattr(torch, dtype))
    config = ds_config(stage, 2, 1, data_types={"grad_accum_dtype": "fp32"})
    del config["zero_optimization"]["stage3_param_persistence_threshold"]
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    if dtype == "float16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    groups = [{"params": [model.first]}, {"params": [model.second]}]
    return deepspeed.initialize(model=model, config=config, model_parameters=groups)[0]


def one_step(engine):
    engine.backward(engine(torch.ones(2, 5, dtype=engine.module.first.dtype)))
    engine.step()


def save_engine(engine, folder):
    """The shards of all ranks and their table in `folder/engine`. Collective."""
    held = shard_module.partitions_of(engine)
    shard = RankShard.of_engine(dist.get_rank(), held)
    (folder / "engine").mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "engine" / shard.file, rank_tensors(held), {})
    of_all = gather_to_rank0(shard, Ranks.current().group)
    if of_all is not None:
        shards = [RankShard(*facts) for facts in of_all]
        table = EngineShards.of(folder / "engine", held.layout, shards)
        table.write_table(table.where)
    dist.barrier()


def trained(combination):
    """An engine after three steps, its second parameter's state as old as its last
    merge.
    """
    engine = new_engine(*combination)
    for number in range(3):
        one_step(engine)
        if number == 0:
            zero.reset_group(engine, 1)
    # As after two steps that fp16 has dropped
    engine.skipped_steps = COUNTERS["skipped_steps"]
    if combination[1] == "float16":
        vars(view_of(engine).loss_scaler).update(SCALER)
    return engine


def live(engine):
    """MasterWeights as the engine gathers them itself, and the parameters that forward reads."""
    model = engine.module
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"{name}.{MASTER}"] = zero.full_fp32(parameter).clone()
        if hasattr(parameter, "ds_tensor"):
            parameter.all_gather()
            tensors[f"{name}.copy"] = parameter.data.clone()
            parameter.partition()
        else:
            tensors[f"{name}.copy"] = parameter.data.clone()
    return tensors


def full(folder):
    """Everything that the shards in a folder hold, put together."""
    shards = EngineShards.open(folder / "engine")
    assert set(shards.layout.shapes) == {"first", "second"}
    tensors = {}
    for name in shards.layout.shapes:
        keys, counts = shards.state(name)
        assert keys == MOMENTS
        for key in (MASTER, *MOMENTS):
            tensors[f"{name}.{key}"] = shards.full(name, key).clone()
        (step,) = counts.values()
        tensors[f"{name}.step"] = torch.as_tensor(step).double()
    return tensors


def place(root, combination):
    return Path(root) / f"{combination[0]}-{combination[1]}"


def save_all(root):
    results = {}
    for combination in COMBINATIONS:
        engine = trained(combination)
        save_engine(engine, place(root, combination))
        results[combination] = {
            **live(engine),
            "scale": scale_of(engine),
            "next": next_loss(engine),
        }
    return results


def scale_of(engine):
    scaler = view_of(engine).loss_scaler
    return {name: getattr(scaler, name, None) for name in SCALER}


def next_loss(engine):
    one_step(engine)
    return engine(torch.ones(2, 5, dtype=engine.module.first.dtype)).item()


def restored(combination, folder):
    engine = new_engine(*combination)
    shard_module.restore(engine, EngineShards.open(folder / "engine"))
    assert {name: getattr(engine, name) for name in COUNTERS} == COUNTERS
    return engine


def restore_all(root, target, pairs):
    """Each of `pairs`: a checkpoint of the first combination into an engine of the second,
    saved anew.
    """
    results = []
    for saved, now in pairs:
        engine = restored(now, place(root, saved))
        facts = {**live(engine), "scale": scale_of(engine)}
        save_engine(engine, place(target, saved) / str(now))
        results.append({**facts, "next": next_loss(engine)})
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("saved"))
    return root, run_pooled(2, save_all, root)[0]


SAME = [(combination, combination) for combination in COMBINATIONS]
CROSS = [
    ((one, dtype), (other, dtype))
    for dtype in ("float32", "bfloat16")
    for one, other in permutations((1, 2, 3), 2)
]


@pytest.mark.parametrize(
    "world, pairs",
    [(1, SAME), (2, SAME), (4, SAME), heavy(3, [*SAME, *CROSS])],
    ids=["1", "2", "4", "3 and any stage"],
)
def test_master_weights_moments_and_counts_are_the_same_to_the_bit(
    saved, tmp_path, world, pairs
):
    root, expected = saved
    for rank in run_pooled(world, restore_all, root, str(tmp_path), pairs):
        for (before, after), result in zip(pairs, rank, strict=True):
            wanted = expected[before]
            tensors = [name for name in wanted if name not in ("scale", "next")]
            assert_same_tensors(
                {n: result[n] for n in tensors},
                {n: wanted[n] for n in tensors},
                (before, after),
            )
            assert result["next"] == pytest.approx(
                wanted["next"], rel=1e-5 if before[1] == "float32" else 2e-2
            )
            if before[0] == after[0]:
                assert result["scale"] == wanted["scale"]
                assert world != 2 or result["next"] == wanted["next"], (
                    "the same number of ranks: bit for bit"
                )
    for before, after in pairs:
        assert_same_tensors(
            full(place(str(tmp_path), before) / str(after)),
            full(place(root, before)),
            (before, after),
        )


def test_steps_and_what_a_shard_holds(saved):
    """`full` is not compared with itself alone: its master weights are the engine's, its state is
    what the run must have.
    """
    root, expected = saved
    for combination in COMBINATIONS:
        stored = full(place(root, combination))
        for name in ("first", "second"):
            assert torch.equal(
                stored[f"{name}.{MASTER}"], expected[combination][f"{name}.{MASTER}"]
            ), combination
            assert all(stored[f"{name}.{key}"].abs().min() > 0 for key in MOMENTS), (
                combination
            )
        assert (stored["first.step"].item(), stored["second.step"].item()) == (3, 2), (
            combination
        )
        layout = EngineShards.open(place(root, combination) / "engine").layout
        assert (layout.world_size, layout.stage) == (2, combination[0])


def opened_while_restored(folder):
    """The files that this rank opens for each kind of shards, at the size that wrote
    them.
    """
    opened = []
    load = shard_table.open_safetensors

    def watch(path):
        opened.append(path.name)
        return load(path)

    shard_table.open_safetensors = watch
    opened_files = []
    for combination in COMBINATIONS:
        shards = EngineShards.open(place(folder, combination) / "engine")
        engine = new_engine(*combination)
        opened.clear()
        shard_module.restore(engine, shards)
        opened_files.append(sorted(set(opened)))
    return opened_files


def test_a_rank_opens_its_own_file_alone(saved):
    for rank, rank_files in enumerate(run_ranks(2, opened_while_restored, saved[0])):
        assert rank_files == [[f"rank-{rank:05d}.safetensors"]] * len(COMBINATIONS)


# -- what is refused -------------------------------------------------------------------


def refused_by_model(folder):
    engine = new_engine(3, "float32")
    engine.module.second.ds_shape = torch.Size((9,))
    try:
        shard_module.restore(engine, EngineShards.open(Path(folder)))
    except UserError as error:
        return str(error)
    return ""


def test_shards_of_another_model_are_refused(saved):
    (message,) = run_pooled(
        1, refused_by_model, str(place(saved[0], (3, "float32")) / "engine")
    )
    assert "in 1 parameters, e.g. second: (7,) there, (9,) here" in message
