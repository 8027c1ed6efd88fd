"""The complete contents of a checkpoint's engine shards."""

from __future__ import annotations

from pathlib import Path

import torch

from mora_ds.engine.shard_reader import MASTER, EngineShards


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
