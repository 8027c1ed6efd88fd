"""Folds the first cycles of a merge ledger into a new base: an explicit, offline step for ledgers that have grown long.

    base + cycles 0..K-1  -> output/base/      a Hugging Face folder; in float32 exactly the sum that a replay forms
    cycles K..            -> output/ledger/    renumbered, chained to the new base's fingerprint
                             output/base.json  refers to the new base
    from a checkpoint also its MoRA matrices and other trained tensors, so that `export_merged` takes `output`

A replay sums in fp32, cycle after cycle, so the same live weights follow from a float32 base bit for bit. One tensor is
in memory at a time.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mora_ds.checkpoint.adapter_files import BaseReference
from mora_ds.checkpoint.layout import (
    BASE_FOLDER,
    LEDGER_FOLDER,
    PROBE_FILE,
    STATE_FILE,
    LedgerLocation,
    find_ledger,
    tokenizer_of,
)
from mora_ds.checkpoint.ledger_tools import check_fresh, copy_adapter, copy_cycles, open_base
from mora_ds.common.errors import POSITIVE, UserError
from mora_ds.common.files import atomic_folder
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.save import plan_shards, write_companions, write_shards
from mora_ds.models.tensor_files import compute_dtype
from mora_ds.remora.ledger import LayerEntry, Ledger
from mora_ds.remora.stored_weights import StoredWeight, stored_weights, weight_shape

_UNCHANGED = (PROBE_FILE, STATE_FILE)
"""Files of a checkpoint that stay valid after compacting in float32, as the live model is the same."""


@dataclass
class _Folding:
    """Forms the new base's tensors, and measures how much of the folded update rounding loses."""

    base: BaseCheckpoint
    ledger: Ledger
    cycles: int
    stored: dict[str, StoredWeight]
    """Key in the base -> the tensor of a layer that some folded cycle adapted."""
    lost: float = field(default=0.0, init=False)
    """Squared norm of what rounding changed."""
    update: float = field(default=0.0, init=False)
    """Squared norm of the folded update."""

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        original = self.base.read(key)
        if key not in self.stored:
            return original.to(dtype)
        entry = self.stored[key].entry
        count = sum(entry.module in self.ledger.layers(cycle) for cycle in range(self.cycles))
        updates = islice(self.ledger.squares_of(entry.module), count)
        exact = self.stored[key].live(self.base, updates, torch.float32)
        rounded = exact.to(dtype)
        self.lost += (rounded.double() - exact.double()).square().sum().item()
        self.update += (exact.double() - original.double()).square().sum().item()
        return rounded


def compact(
    path: Path,
    output: Path,
    first: int | None = None,
    dtype: str = "float32",
    base_folder: Path | None = None,
    max_shard_gib: float = 5.0,
) -> list[str]:
    """Folds the `first` cycles (by default all) of the ledger at `path` into a new base under `output`.

    `path`: a ledger, a checkpoint or a run's output folder. `dtype`: of the new base's floating tensors; any other than
    "float32" rounds them. `base_folder`: the base, if no base.json refers to it or it was moved. Returns lines to
    print. Raises `UserError` naming the flag to change, `RunError` on a full disk; `output` then does not exist.
    """
    target, location = compute_dtype(dtype), find_ledger(path)
    if not POSITIVE.allow(max_shard_gib):
        raise UserError(f"--max_shard_gib must be {POSITIVE}, got {max_shard_gib}")
    check_fresh(output)
    ledger = location.open()
    count = _count(ledger, first)
    reference = BaseReference.read(location.reference) if location.reference is not None else None
    base = open_base(_base_folder(location, reference, base_folder), ledger)
    folding = _Folding(base, ledger, count, _stored_by_key(ledger, count, base, reference))
    with atomic_folder(output.absolute()) as folder:
        fingerprint = _write_base(folding, folder / BASE_FOLDER, target, int(max_shard_gib * 2**30), location)
        copy_cycles(ledger, range(count, ledger.cycles), folder / LEDGER_FOLDER, fingerprint)
        if reference is not None:
            BaseReference(BASE_FOLDER, fingerprint, reference.keys, reference.dtype).write(folder)
        if location.checkpoint is not None:
            folded = [record.step for record in ledger.records[:count]]
            copy_adapter(location, folder, ledger.cycles - count, "compacted_cycles_of_steps", folded)
            for name in _UNCHANGED if target is torch.float32 else ():
                if (location.checkpoint / name).is_file():
                    shutil.copyfile(location.checkpoint / name, folder / name)
    return _lines(folding, output, dtype)


def _count(ledger: Ledger, first: int | None) -> int:
    if not ledger.cycles:
        raise UserError(f"{ledger.folder} has no cycles: there is nothing to fold into a base")
    count = ledger.cycles if first is None else first
    if not 1 <= count <= ledger.cycles:
        raise UserError(f"--first {count}: {ledger.folder} has {ledger.cycles} cycle(s)")
    return count


def _base_folder(location: LedgerLocation, reference: BaseReference | None, override: Path | None) -> Path:
    if override is not None:
        return override
    if reference is None or location.reference is None:
        raise UserError(f"--base: name the folder of the base of {location.ledger}; no base.json refers to it")
    return location.reference / reference.folder


def _stored_by_key(
    ledger: Ledger, cycles: int, base: BaseCheckpoint, reference: BaseReference | None
) -> dict[str, StoredWeight]:
    """Key in the base -> the layer's tensor. Raises `UserError` for a weight that is missing in the base, has another
    shape there or is tied to another parameter."""
    entries = {name: entry for cycle in range(cycles) for name, entry in ledger.layers(cycle).items()}
    keys = reference.keys if reference is not None else _guess_keys(base, entries)
    stored: dict[str, StoredWeight] = {}
    for entry in entries.values():
        key = keys.get(entry.weight)
        if key is None or key not in base:
            raise UserError(f"{base.folder} has no tensor for {entry.weight}, which {ledger.folder} changes")
        if (shape := base.shape_dtype(key)[0]) != (wanted := weight_shape(entry)):
            raise UserError(f"{key} of {base.folder} has shape {shape}, its MoRA matrix is for {wanted}")
        if sharers := [name for name, other in keys.items() if other == key and name != entry.weight]:
            raise UserError(f"{entry.weight} is tied to {', '.join(sharers)}: no single tensor can stand for both")
        stored.update(stored_weights(entry, key, base))
    return stored


def _guess_keys(base: BaseCheckpoint, entries: dict[str, LayerEntry]) -> dict[str, str]:
    """Keys are the parameters' names, or those without the model's prefix (GPT-2's "transformer.")."""
    weights = [entry.weight for entry in entries.values()]
    return base.map_parameters(weights, weights[0].split(".")[0] if weights else "")


def _write_base(folding: _Folding, folder: Path, dtype: torch.dtype, limit: int, location: LedgerLocation) -> str:
    """Writes the new base in files of at most `limit` bytes and returns its fingerprint."""
    folder.mkdir()
    shards = plan_shards(folding.base, folding.base.keys(), dtype, limit)
    write_shards(folder, shards, folding.tensor)
    write_companions(folding.base, folder, dtype, tokenizer_of(location.checkpoint))
    return BaseCheckpoint.open(folder).fingerprint()


def _lines(folding: _Folding, output: Path, dtype: str) -> list[str]:
    left = folding.ledger.cycles - folding.cycles
    layers = len({each.entry.module for each in folding.stored.values()})
    text = [
        f"{output / BASE_FOLDER}: the base with {folding.cycles} cycle(s) in {layers} layers, in {dtype}",
        f"{output / LEDGER_FOLDER}: {left} cycle(s) left, chained to the new base",
    ]
    if dtype == "float32":
        text.append("nothing is lost: the live weights formed from these are bit for bit those formed before")
    else:
        loss = math.sqrt(folding.lost / folding.update) if folding.update else 0.0
        text.append(
            f"every weight was rounded to {dtype}: a relative {loss:.2e} of the folded update is lost; float32 loses"
            " nothing"
        )
    if not left:
        text.append("a run that starts from it needs another --seed, or its groupings repeat those that were folded")
    return text
