"""Leading singular vectors of the original weights: read from the base, a layer at a time, written to one file.

    base + {module: Wanted} -> write_vectors -> the file that `singular_vectors` reads

Exact (LAPACK, float64) where the matrix is small or most of its vectors are wanted; else by randomised subspace
iteration (Halko, Martinsson & Tropp 2011, `torch.svd_lowrank`), whose vectors are orthonormal too, but blend those of
singular values that lie close together. The sign of a pair, which no decomposition fixes, makes the largest entry of
the right vector positive. Seeds are hashes of the modules' names: the same machine finds the same bits again, and no
other needs to, since what is written is kept.
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
from mora_ds.errors import UserError
from mora_ds.files import atomic_path, sha256_file
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.tensor_files import SafetensorsWriter

EXACT_NUMBERS = 2**22
"""Up to so many elements (2048 x 2048) a weight is decomposed exactly."""

OVERSAMPLED = 32
"""Further vectors that the randomised iteration carries along."""
_ITERATIONS = 4


@dataclass(frozen=True)
class Wanted:
    """Of one layer."""

    key: str
    """Its weight's name in the base."""
    transposed: bool
    """Whether it is stored (d_in, d_out)."""
    d_in: int
    d_out: int
    count: int
    """How many leading pairs; at most the shorter side."""

    @property
    def is_exact(self) -> bool:
        most = min(self.d_in, self.d_out)
        return self.d_in * self.d_out <= EXACT_NUMBERS or 2 * (self.count + OVERSAMPLED) >= most


def cache_key(fingerprint: str, wanted: Mapping[str, Wanted]) -> str:
    """Hex digits that stand for a base and what is wanted of it."""
    content = [fingerprint, [(module, vars(each)) for module, each in sorted(wanted.items())]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@torch.no_grad()
def write_vectors(
    path: Path, base: BaseCheckpoint, wanted: Mapping[str, Wanted], device: torch.device | str = "cpu"
) -> None:
    """Writes the file at `path`, whole or not at all. In memory is one layer.

    Raises `UserError` naming a weight that is not finite, and `RunError` on a full disk.
    """
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for module, each in wanted.items():
        layout[f"{module}.left"] = ((each.count, each.d_out), torch.float32)
        layout[f"{module}.right"] = ((each.count, each.d_in), torch.float32)
        layout[f"{module}.norm"] = ((1,), torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as beside, SafetensorsWriter(beside, layout, {"base": base.fingerprint()}) as writer:
        for module, each in wanted.items():
            weight = base.read(each.key).to(device, torch.float64)
            weight = weight.T if each.transposed else weight
            if not torch.isfinite(weight).all():
                raise UserError(f"{base.folder}: {each.key} is not finite, and has no singular vectors")
            left, right = leading_vectors(weight, each, module)
            writer.write(f"{module}.left", left.float())
            writer.write(f"{module}.right", right.float())
            writer.write(f"{module}.norm", weight.norm().reshape(1))


def record_of(path: Path) -> VectorsRecord:
    """Of a file that was written. Reads all of it."""
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
    left, right = left[:, : wanted.count].T, right[:, : wanted.count].T
    largest = right.abs().argmax(dim=1, keepdim=True)
    signs = right.gather(1, largest).sign()
    return (left * signs).contiguous(), (right * signs).contiguous()
