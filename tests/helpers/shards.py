"""Engine shards, written as a checkpoint has them."""

import torch.distributed as dist

from mora_ds.engine import shards
from mora_ds.runtime.exchange import gather_to_first
from mora_ds.runtime.ranks import Ranks


def save_engine(engine, folder):
    """The shards of all ranks and their table in `folder/engine`. Collective."""
    layout, shard, tensors = shards.take(engine)
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_shard(folder / "engine" / shard.file, tensors)
    of_all = gather_to_first(shard, Ranks.current().group)
    if of_all is not None:
        shards.EngineShards.of(folder / "engine", layout, of_all).write_table()
    dist.barrier()
