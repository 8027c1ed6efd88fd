"""Engine shards, written as a checkpoint has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from mora_ds.engine import shard_writer
from mora_ds.engine.shard_index import ShardIndex
from mora_ds.runtime.exchange import gather_to_first
from mora_ds.runtime.ranks import Ranks


def save_engine(engine: Any, folder: Path) -> None:
    """The shards of all ranks and their table in `folder/engine`. Collective."""
    layout, shard, tensors = shard_writer.take(engine)
    if shard is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shard_writer.write_shard(folder / "engine" / shard.file, tensors)
    shards = gather_to_first(shard, Ranks.current().group)
    if shards is not None:
        ShardIndex.of(layout, [shard for shard in shards if shard is not None]).write(folder / "engine")
    dist.barrier()
