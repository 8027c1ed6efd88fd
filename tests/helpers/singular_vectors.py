"""Singular vectors of a single weight, written and registered as a run does it for the subspace operator."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mora_ds.adapters.ops import singular_vectors
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.svd import Wanted, record_of, write_vectors
from mora_ds.remora.ledger import VECTORS_FILE

MODULE = "layer"


def register_vectors(weight: Tensor, count: int, folder: Path, module: str = MODULE) -> str:
    """The name of the vectors of a weight (d_out, d_in) that a base of that one tensor has."""
    (folder / "config.json").write_text("{}")
    save_file({"w": weight.float().contiguous()}, folder / "model.safetensors")
    path = folder / "vectors" / VECTORS_FILE
    d_out, d_in = weight.shape
    write_vectors(path, BaseCheckpoint.open(folder), {module: Wanted("w", False, d_in, d_out, count)})
    name = record_of(path).name
    singular_vectors.register(name, path)
    return name
