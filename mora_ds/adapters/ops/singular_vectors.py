"""Singular vectors of the base's weights, by name: what the subspace operator and the alignment loss read.

    base_svd -> a safetensors file -> register(name, path) -> read(name, module, first, count)
                                                           -> norm(name, module)

    "<module>.left"  (count, d_out) fp32     left singular vectors of W0 (d_out, d_in), one a row, leading ones first
    "<module>.right" (count, d_in)  fp32     the right ones, in the same order
    "<module>.norm"  (1,) fp64               Frobenius norm of W0

A file is called after its contents (`VectorsRecord.name`), so that a spec that names it means these very bits, on every
rank and after every journey: nobody decomposes anything twice. The ledger keeps a copy, and makes it known when it is
opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mora_ds.errors import RunError, UserError

_NAME = 16
"""Hex digits of a name."""

_paths: dict[str, list[Path]] = {}
"""Every place that has been told, the newest first: a checkpoint may go while the run's own ledger stays."""
_handles: dict[str, Any] = {}


@dataclass(frozen=True)
class VectorsRecord:
    """What a ledger notes of a file."""

    sha256: str
    size: int

    @property
    def name(self) -> str:
        """What specs call it."""
        return self.sha256[:_NAME]


def register(name: str, path: Path) -> None:
    """From here on `name` is read from `path`, by this process, and from where it was before should that go. The
    contents are whoever's who knows the hash."""
    known = _paths.setdefault(name, [])
    if known[:1] != [path]:
        known[:] = [path, *(each for each in known if each != path)]
        _handles.pop(name, None)


def path_of(name: str) -> Path:
    """Where a file lies. Raises `RunError` for a name that nobody has registered, or whose files are gone."""
    found = next((path for path in _paths.get(name, []) if path.is_file()), None)
    if found is None:
        raise RunError(
            f"the singular vectors {name or 'of this base'} are not at hand: a run or its ledger holds them "
            "(vectors.safetensors), and makes them known when it is opened"
        )
    return found


def read(name: str, module: str, first: int, count: int) -> tuple[Tensor, Tensor]:
    """(left (count, d_out), right (count, d_in)) of vectors first, first + 1, ..., fp32 on the CPU; behind the last of
    the min(d_out, d_in) that a layer has comes the leading one again.

    Raises `RunError` where they are not at hand, and `UserError` naming the file where it does not hold them.
    """
    left, right = (_handle(name, module).get_slice(f"{module}.{side}") for side in ("left", "right"))
    (held, d_out), (_, d_in) = left.get_shape(), right.get_shape()
    most = min(d_out, d_in)
    rows = [(first + number) % most for number in range(count)]
    needed = max(count, max(rows) + 1)
    if needed > held:
        raise UserError(f"{_paths[name][0]} holds {held} of {module}'s {most} singular vectors, not {needed}")
    return left[:][rows], right[:][rows]


def norm(name: str, module: str) -> float:
    """|W0| of a layer. Raises as `read`."""
    return float(_handle(name, module).get_tensor(f"{module}.norm"))


def _handle(name: str, module: str) -> Any:
    """An open file is read on even where it was deleted."""
    if name not in _handles:
        path = path_of(name)
        try:
            _handles[name] = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or damaged: {error}") from error
    if f"{module}.left" not in _handles[name].keys():  # noqa: SIM118  (a safetensors handle is no mapping)
        raise UserError(f"{_paths[name][0]} holds no singular vectors of {module}")
    return _handles[name]
