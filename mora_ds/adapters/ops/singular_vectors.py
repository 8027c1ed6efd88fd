"""Files of singular vectors of the base's weights, by name, for the subspace operator.

    models.svd -> a safetensors file -> register(name, path) -> read(name, module, count)
                                                           -> norm(name, module)

    "<module>.left"  (count, d_out) fp32     left singular vectors of W0 (d_out, d_in), one a row, leading ones first
    "<module>.right" (count, d_in)  fp32     the right ones, in the same order
    "<module>.norm"  (1,) fp64               Frobenius norm of W0

A file is named after the hash of its contents (`VectorsRecord.name`), so that a spec that names it means these bits, on
every rank and after every resume. The merge ledger keeps a copy, and registers it when it is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.untrusted import Count

_NAME = 16
"""Hex digits in a name."""

_paths: dict[str, list[Path]] = {}
"""Name -> paths, the newest first: a checkpoint may be deleted while the run's own ledger stays."""
_handles: dict[str, Any] = {}


@dataclass(frozen=True)
class VectorsRecord:
    """What the merge ledger records of a file."""

    sha256: str
    size: Count

    @property
    def name(self) -> str:
        """The name by which specs refer to the file."""
        return self.sha256[:_NAME]


def register(name: str, path: Path) -> None:
    """From here on this process reads `name` from `path`, and from earlier paths if that is deleted. The caller has
    verified the contents."""
    known = _paths.setdefault(name, [])
    if known[:1] != [path]:
        known[:] = [path, *(known_path for known_path in known if known_path != path)]
        _handles.pop(name, None)


def path_of(name: str) -> Path:
    """The path of a file. Raises `RunError` for a name that was never registered, or whose files are gone."""
    newest = next((path for path in _paths.get(name, []) if path.is_file()), None)
    if newest is None:
        raise RunError(
            f"the file of the singular vectors {name or 'of this base'} is missing: open the run or the merge ledger "
            "that holds it (vectors.safetensors) first"
        )
    return newest


def read(name: str, module: str, count: int) -> tuple[Tensor, Tensor]:
    """(left (count, d_out), right (count, d_in)) of the leading vectors, fp32 on the CPU.

    Raises `RunError` where the file is missing, and `UserError` naming it where it does not hold the vectors.
    """
    handle = _handle(name, module)
    left, right = (handle.get_slice(f"{module}.{side}") for side in ("left", "right"))
    shapes = left.get_shape(), right.get_shape()
    if [len(shape) for shape in shapes] != [2, 2] or min(map(min, shapes)) < 1 or shapes[0][0] != shapes[1][0]:
        raise UserError(f"{_paths[name][0]}: the singular vectors of {module} have the shapes {shapes}")
    (stored, d_out), (_, d_in) = shapes
    if count > stored:
        most = min(d_out, d_in)
        raise UserError(f"{_paths[name][0]} holds {stored} of {module}'s {most} singular vectors, not {count}")
    return left[:count], right[:count]


def norm(name: str, module: str) -> float:
    """Frobenius norm of a layer's W0. Raises as `read`."""
    return float(_handle(name, module).get_tensor(f"{module}.norm"))


def _handle(name: str, module: str) -> Any:
    """The open file, which can be read even after it was deleted."""
    if name not in _handles:
        path = path_of(name)
        try:
            _handles[name] = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or damaged: {error}") from error
    tensor_names = {f"{module}.{kind}" for kind in ("left", "right", "norm")}
    if not tensor_names <= set(_handles[name].keys()):
        raise UserError(f"{_paths[name][0]} holds no singular vectors of {module}")
    return _handles[name]
