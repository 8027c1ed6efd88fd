"""Engine shards: written as a checkpoint has them, as versions up to 0.2 wrote them; their complete contents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mora_ds.common.files import write_json_atomic
from mora_ds.engine import shard_writer
from mora_ds.engine.shard_index import Layout, RankShard, ShardIndex, layout_path
from mora_ds.engine.shard_reader import MASTER, EngineShards
from mora_ds.runtime.exchange import gather_to_first
from mora_ds.runtime.ranks import Ranks


def save_engine(engine: Any, folder: Path) -> None:
    """The shards of all ranks and their table in `folder/engine`. Collective."""
    layout = shard_writer.save_shards(engine, folder, "engine")
    own = RankShard.of(layout) if layout.rank < layout.writers else None
    shards = gather_to_first(own, Ranks.current().group)
    if shards is not None:
        ShardIndex.of(layout, [shard for shard in shards if shard is not None]).write(folder / "engine")
    dist.barrier()


def write_old_layout(folder: Path, layout: Layout) -> None:
    """layout-N.json, on the ranks that have written a shard."""
    if layout.rank < layout.writers:
        groups = layout.groups if layout.rank == 0 else []
        write_json_atomic(layout_path(folder, layout.rank), replace(layout, groups=groups).to_dict(), indent=None)


def contents_of(engine: Path) -> dict[str, torch.Tensor]:
    """Every tensor and scalar that the shards in a folder hold, put together."""
    shards, contents = EngineShards.open(engine), {}
    for name in shards.shapes:
        contents |= {f"{name} {key}": shards.whole(name, key) for key in (MASTER, *shards.keys(name))}
        contents |= {f"{name} {key}": torch.as_tensor(value) for key, value in shards.scalars(name).items()}
    return contents


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
