"""Everything that a run leaves in its output folder, compared byte for byte with that of another run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.helpers.jobs import curve

_MEASURED = {"metrics.jsonl", "run.yaml", "summary.json"}
"""Files that may differ between two equal runs: they hold times, memory, the name of the folder."""


def tree(out: Path) -> dict[str, bytes]:
    """Path -> content of every file and link of a run, except TensorBoard's, whose names hold time and process."""
    return {str(path.relative_to(out)): _content(path) for path in _entries(out)}


def _unpadded(out: Path) -> dict[str, bytes]:
    """`tree` without DeepSpeed's master weights, which may end in uninitialised padding."""
    contents = tree(out)
    for name in contents:
        if "/engine/" in name and name.endswith(".pt"):
            loaded = torch.load(out / name, map_location="cpu", weights_only=False)  # written a moment ago
            contents[name] = b"".join(_tensors(loaded))
        elif name.startswith("checkpoints/") and name.endswith("manifest.json"):
            listed = json.loads(contents[name])["files"].items()
            contents[name] = repr([(file, "engine/" in file or facts) for file, facts in listed]).encode()
    return contents


def _tensors(value: Any, path: str = "") -> Iterator[bytes]:
    """The path and bytes of every tensor in a loaded shard, except the master weights."""
    if isinstance(value, torch.Tensor):
        yield path.encode() + value.detach().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, part in value.items():
            if key != "fp32_flat_groups":
                yield from _tensors(part, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors(part, f"{path}/{index}")


def _entries(out: Path) -> Iterator[Path]:
    for path in sorted(out.rglob("*")):
        is_leaf = path.is_symlink() or not path.is_dir() or not any(path.iterdir())
        if is_leaf and "tensorboard" not in path.parts:
            yield path


def _content(path: Path) -> bytes:
    if path.is_symlink():
        return os.readlink(path).encode()
    return b"" if path.name in _MEASURED or path.is_dir() else path.read_bytes()


def assert_same_outcome(out: Path, reference: Path, padded: bool = False) -> None:
    """Checkpoints (MoRA matrices, moments, random states, manifest), ledger, merged model and curve are equal.

    `padded`: the number of processes does not divide every parameter. DeepSpeed 0.19.8 fills up the master weights of
    the last one with `torch.empty`, so shards are compared without them; adapter.safetensors holds them unsharded.
    """
    assert curve(out) == curve(reference)
    ours, expected = (_unpadded(folder) if padded else tree(folder) for folder in (out, reference))
    assert ours.keys() == expected.keys(), f"differ: {ours.keys() ^ expected.keys()}"
    assert [path for path in expected if ours[path] != expected[path]] == []
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, reference)]
    for name in ("steps", "tokens", "merges", "perplexity_before", "perplexity_after"):
        assert summaries[0][name] == summaries[1][name], name
