"""Computes leading singular vectors of the base's weights, one layer at a time, and writes them to one file.

    base + {module: Wanted} -> write_vectors -> the file that `adapters/ops/singular_vectors.py` reads

Exact (LAPACK, float64) where the matrix is small or most of its vectors are needed; otherwise by randomised subspace
iteration (Halko, Martinsson & Tropp 2011, `torch.svd_lowrank`), whose vectors are orthonormal too, but mix those of
singular values that are close together. The sign of a pair is arbitrary: the largest entry of the right vector is made
positive. Seeds are hashes of the modules' names, so that one machine computes the same bits again; other machines read
the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mora_ds.adapters.ops.singular_vectors import VectorsRecord
from mora_ds.common.errors import UserError
from mora_ds.common.files import atomic_path, sha256_file
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.tensor_files import SafetensorsWriter

EXACT_NUMBERS = 2**22
"""Largest number of elements (2048 x 2048) of a weight that is decomposed exactly."""

OVERSAMPLED = 32
"""Number of additional vectors in the randomised iteration."""
_ITERATIONS = 4


@dataclass(frozen=True)
class Wanted:
    """The weight of one layer, and how many of its singular vectors are needed."""

    key: str
    """Name of the weight in the base."""
    transposed: bool
    """Whether the weight is stored as (d_in, d_out)."""
    d_in: int
    d_out: int
    count: int
    """Number of leading pairs; at most the shorter side."""

    @property
    def is_exact(self) -> bool:
        most = min(self.d_in, self.d_out)
        return self.d_in * self.d_out <= EXACT_NUMBERS or 2 * (self.count + OVERSAMPLED) >= most


def cache_key(fingerprint: str, wanted: Mapping[str, Wanted]) -> str:
    """16 hex digits that identify a base and the vectors needed of it."""
    content = [fingerprint, [(module, vars(vectors)) for module, vectors in sorted(wanted.items())]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@torch.no_grad()
def write_vectors(
    path: Path, base: BaseCheckpoint, wanted: Mapping[str, Wanted], device: torch.device | str = "cpu"
) -> None:
    """Writes the file atomically, with one layer in memory at a time.

    Raises `UserError` naming a weight that is not finite, and `RunError` on a full disk.
    """
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for module, vectors in wanted.items():
        layout[f"{module}.left"] = ((vectors.count, vectors.d_out), torch.float32)
        layout[f"{module}.right"] = ((vectors.count, vectors.d_in), torch.float32)
        layout[f"{module}.norm"] = ((1,), torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, SafetensorsWriter(temporary, layout, {"base": base.fingerprint()}) as writer:
        for module, vectors in wanted.items():
            weight = base.read(vectors.key).to(device, torch.float64)
            weight = weight.T if vectors.transposed else weight
            if not torch.isfinite(weight).all():
                raise UserError(f"{base.folder}: {vectors.key} has NaN or infinite values, and no singular vectors")
            left, right = leading_vectors(weight, vectors, module)
            writer.write(f"{module}.left", left.float())
            writer.write(f"{module}.right", right.float())
            writer.write(f"{module}.norm", weight.norm().reshape(1))


def record_of(path: Path) -> VectorsRecord:
    """Name and size of a file of vectors; reads all of it to hash it."""
    return VectorsRecord(sha256_file(path), path.stat().st_size)


def leading_vectors(weight: Tensor, wanted: Wanted, module: str) -> tuple[Tensor, Tensor]:
    """(left (count, d_out), right (count, d_in)) of a float64 weight (d_out, d_in)."""
    if wanted.is_exact:
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        right = right.T
    else:
        devices = [] if weight.device.type == "cpu" else [weight.device]
        with torch.random.fork_rng(devices, device_type=weight.device.type):
            torch.manual_seed(int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little"))
            left, _, right = torch.svd_lowrank(weight.float(), wanted.count + OVERSAMPLED, niter=_ITERATIONS)
    left = left[:, : wanted.count].T
    right = right[:, : wanted.count].T
    largest = right.abs().argmax(dim=1, keepdim=True)
    signs = right.gather(1, largest).sign()
    return (left * signs).contiguous(), (right * signs).contiguous()
