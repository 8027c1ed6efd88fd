"""The merge ledger: every merged MoRA matrix M of a run, on disk, append-only and
chained by hashes.

    merged weight = cast( W_original + delta_weight(M_0) + delta_weight(M_1) + ... )      fp32 sum, rounded once
    (of adapters whose update is no delta: cast( merged_weight(... merged_weight(W_original, value_0), ...) ), in fp32)

The base on disk never changes; the ledger holds all that a run has merged into it.
Merge, resume and export form merged weights by one function, `merged_weight`, so that they
agree bit for bit.

    folder/cycle-00000.safetensors   "<module name>.mora_matrix" -> fp32 (r_hat, r_hat); the layers in the header
                                     (LoRA: "<module name>.factors" -> fp32 (rank, d_in + d_out))
    folder/ledger.json               the cycles' hashes, each chained to the one before, the first to the base

A cycle exists once ledger.json names it. That file is replaced by an atomic rename
after the cycle's file is safely on disk, so an append that is killed at any point
leaves the ledger unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mora_ds.adapters.ops.spec import Update, UpdateSpec
from mora_ds.adapters.registry import spec_from_dict
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import (
    FORMAT,
    JsonObject,
    as_path,
    atomic_path,
    await_file,
    file_problem,
    link_or_copy,
    malformed,
    read_formatted,
    sha256_file,
    write_compact_json,
)
from mora_ds.common.tensor_files import SafetensorsWriter, open_safetensors, shape_dtype
from mora_ds.common.untrusted import Count, FileName, entry, plain_json, shown, typed

LEDGER_FILE = "ledger.json"


@dataclass(frozen=True)
class LayerEntry:
    """An adapted layer: its weight, and the operator of its MoRA matrix."""

    module: FileName
    """Name in the model, e.g. model.layers.0.self_attn.q_proj."""
    transposed: bool
    """Whether the weight is stored (d_in, d_out), as by GPT-2's Conv1D."""
    operator: UpdateSpec

    @property
    def weight(self) -> str:
        """Name of its weight, such as model.layers.0.self_attn.q_proj.weight."""
        return self.operator.weight_name(self.module)

    @property
    def mora_matrix(self) -> str:
        """The name of its matrix (or LoRA's factors) in safetensors files."""
        return f"{self.module}.{self.operator.adapter_weight_name}"

    def to_dict(self) -> JsonObject:
        """The entry as JSON, without the module name, which is its key."""
        return {
            "weight": self.weight,
            "transposed": self.transposed,
            "operator": self.operator.to_dict(),
        }

    @classmethod
    def from_dict(cls, module: str, values: JsonObject) -> LayerEntry:
        """Inverse of `to_dict`. Raises `UserError`."""
        known = typed(_Entry, values, module)
        layer = cls(module, known.transposed, spec_from_dict(known.operator))
        if known.weight != layer.weight:
            raise UserError(f"{module}: its weight cannot be {shown(known.weight)}")
        return layer


Layers: TypeAlias = dict[str, LayerEntry]
"""The adapted layers, by their modules' names."""


def layers_to_dict(layers: Layers) -> dict[str, JsonObject]:
    """{module name: entry} as JSON."""
    return {name: layer.to_dict() for name, layer in layers.items()}


def layers_from_dict(values: JsonObject) -> Layers:
    """Inverse of `layers_to_dict`. Raises `UserError`."""
    entries = typed(dict[FileName, Any], values, "layers")
    return {
        name: LayerEntry.from_dict(name, content) for name, content in entries.items()
    }


@dataclass(frozen=True)
class _Entry:
    """The JSON of a `LayerEntry`."""

    weight: FileName
    transposed: bool
    operator: JsonObject


def agree_on_layers(
    known: Layers,
    layers: Layers,
    path: Path,
) -> None:
    """Adds `layers`, of the file at `path`, to the `known` ones. Raises `UserError`
    where one has another shape now."""
    for name, layer in layers.items():
        shape = _shape(layer)
        if shape != _shape(known.setdefault(name, layer)):
            raise UserError(
                f"{path}: {name} is another layer than in earlier cycles: {shape} (d_in, d_out, transposed, experts)"
            )


def _shape(layer: LayerEntry) -> tuple[int, ...]:
    operator = layer.operator
    return operator.d_in, operator.d_out, layer.transposed, *operator.weight_shape[:-2]


@dataclass(frozen=True)
class CycleRecord:
    """The entry of a cycle in ledger.json."""

    cycle: Count
    step: Count
    file: FileName
    sha256: str
    size: Count
    chain: str
    """sha256, in hex, of the chain before (first: the base's fingerprint) and
    `sha256`."""


class Ledger:
    """A ledger's folder, changed by one process at a time. See `create` and `open`."""

    def __init__(
        self,
        folder: Path,
        base_fingerprint: str,
        records: Sequence[CycleRecord],
    ) -> None:
        self.folder = folder
        self.base_fingerprint = base_fingerprint
        self._records = list(records)
        self._reader = lru_cache(maxsize=None)(open_safetensors)
        self._layers: dict[int, Layers] = {}

    @classmethod
    def create(
        cls, folder: Path, base_fingerprint: str, *, replace: bool = False
    ) -> Ledger:
        """An empty ledger for a base. Other files in the folder stay. Raises
        `UserError` where it has a ledger, unless that is to be replaced."""
        if (folder / LEDGER_FILE).exists() and not replace:
            raise UserError(f"{folder} already holds the ledger of a run")
        folder.mkdir(parents=True, exist_ok=True)
        ledger = cls(folder, base_fingerprint, [])
        ledger._write([])
        ledger._remove_strays()
        return ledger

    @classmethod
    def open(
        cls,
        folder: Path | str,
        base_fingerprint: str | None = None,
        hashes: bool = True,
    ) -> Ledger:
        """Opens and checks a ledger: numbering, chain, sizes, and with `hashes` all
        content; without, a cycle's header is checked when it is read.

        Raises `UserError` naming the file and the problem, or that it belongs to
        another base.
        """
        folder = as_path(folder, "Ledger.open: `folder`")
        path = folder / LEDGER_FILE
        content = read_formatted(path)
        fingerprint = entry(content, "base_fingerprint", str, path)
        records = entry(content, "cycles", list[CycleRecord], path)
        if base_fingerprint is not None and fingerprint != base_fingerprint:
            raise UserError(
                f"{path} belongs to another base: fingerprint {fingerprint}, not {base_fingerprint}"
            )
        ledger = cls(folder, fingerprint, records)
        ledger._check_records()
        ledger.verify(hashes)
        return ledger

    def release(self) -> None:
        """Unmap the files of all cycles, and forget their layers."""
        self._reader.cache_clear()
        self._layers.clear()

    def snapshot(self) -> Ledger:
        """A ledger of the present cycles, which later appends do not change."""
        return Ledger(self.folder, self.base_fingerprint, self._records)

    @property
    def cycles(self) -> int:
        """Number of merged cycles."""
        return len(self._records)

    @property
    def records(self) -> tuple[CycleRecord, ...]:
        return tuple(self._records)

    def layers(self, cycle: int) -> Layers:
        """Module name -> entry, with the operator that the layer had in the cycle. Raises
        `UserError` where the file does not hold their matrices."""
        if cycle not in self._layers:
            path = self.folder / self._records[cycle].file
            handle = self._handle(cycle)
            with malformed(path):
                text = handle.metadata()["layers"]
                layers = layers_from_dict(plain_json(text, "layers"))
            _check_header(path, handle, layers)
            self._layers[cycle] = layers
        return self._layers[cycle]

    def mora_matrix(self, cycle: int, module: str) -> Tensor:
        """The layer's matrix (r_hat, r_hat) fp32 on the CPU; do not write to it."""
        return self._handle(cycle).get_tensor(self.layers(cycle)[module].mora_matrix)

    def mora_matrices_of(self, module: str) -> Iterator[Update]:
        """(operator, matrix) of a layer for each cycle that adapted it, in order. Raises
        `UserError` where a cycle has the layer in another shape."""
        known: Layers = {}
        for cycle, record in enumerate(self._records):
            if layer := self.layers(cycle).get(module):
                agree_on_layers(known, {module: layer}, self.folder / record.file)
                yield layer.operator, self.mora_matrix(cycle, module)

    def append(
        self,
        step: int,
        layers: Layers,
        mora_matrices: Iterable[tuple[str, Tensor]],
    ) -> int:
        """Adds a cycle and returns its number.

        `mora_matrices` yields (module name, matrix (r_hat, r_hat) fp32) for exactly the keys
        of `layers`, in any order. Raises `RunError` for a full disk or a matrix that is
        not finite; the ledger is then unchanged.
        """
        cycle = self.cycles
        path = self.folder / _cycle_file(cycle)
        with atomic_path(path) as temporary:
            _write_cycle(temporary, cycle, step, layers, mora_matrices)
            sha256 = sha256_file(temporary)
            size = temporary.stat().st_size
        record = self._next(step, sha256, size)
        self._write([*self._records, record])
        self._records.append(record)
        return cycle

    def follow(self, step: int, sha256: str, size: int) -> None:
        """Note the cycle that another process has appended. Reads nothing of earlier
        ones, so that a merge costs the same however many there are. Raises `RunError`
        where its file does not come in sight."""
        record = self._next(step, sha256, size)
        await_file(self.folder / record.file, size)
        self._records.append(record)

    def _next(self, step: int, sha256: str, size: int) -> CycleRecord:
        cycle = self.cycles
        chain = _link(self.head, sha256)
        return CycleRecord(cycle, step, _cycle_file(cycle), sha256, size, chain)

    def copy_to(self, folder: Path) -> Ledger:
        """Copies the ledger over another folder's, by hard links where possible.

        The folder holds a valid ledger at any time: an empty one until all files are in
        place. Files that are copied, to another disk, are hashed there; links are the
        same files. Raises `UserError` where a copy is not as the file was written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(self.folder):
            return self
        copy = Ledger(folder, self.base_fingerprint, self._records)
        copy._write([])
        for record in self._records:
            source = self.folder / record.file
            target = folder / record.file
            link_or_copy(source, target)
            if not target.samefile(source):
                copy._check(record, hashes=True)
        copy._write(self._records)
        copy._remove_strays()
        return copy

    def _remove_strays(self) -> None:
        """Delete files of cycles that nothing refers to any more."""
        known = {self.folder / record.file for record in self._records}
        for path in set(self.folder.glob("cycle-*.safetensors")) - known:
            with suppress(OSError):
                path.unlink()

    def verify(self, hashes: bool = True) -> None:
        """Checks every file. Raises `UserError` naming the first that is not as it was
        written."""
        known: Layers = {}
        for record in self._records:
            self._check(record, hashes)
            if hashes:
                path = self.folder / record.file
                agree_on_layers(known, self.layers(record.cycle), path)
                # A ledger of hundreds of cycles is not kept in memory
                self.release()

    def _check(self, record: CycleRecord, hashes: bool) -> None:
        path = self.folder / record.file
        problem = file_problem(path, record.size, record.sha256 if hashes else None)
        if problem:
            raise UserError(f"the ledger is damaged at cycle {record.cycle}: {problem}")

    def _check_records(self) -> None:
        path = self.folder / LEDGER_FILE
        chain = self.base_fingerprint
        for expected, record in enumerate(self._records):
            file = _cycle_file(expected)
            if record.cycle != expected or record.file != file:
                raise UserError(
                    f"{path} has a hole: cycle {expected} is missing, {record.file} comes next"
                )
            chain = _link(chain, record.sha256)
            if record.chain != chain:
                raise UserError(
                    f"{path}: the chain of hashes is broken at cycle {expected} ({record.file})"
                )

    @property
    def head(self) -> str:
        """The last link of the chain: it stands for the base and all cycles."""
        return self._records[-1].chain if self._records else self.base_fingerprint

    def _handle(self, cycle: int) -> Any:
        return self._reader(self.folder / self._records[cycle].file)

    def to_dict(self) -> JsonObject:
        """What ledger.json holds."""
        return {
            "format": FORMAT,
            "base_fingerprint": self.base_fingerprint,
            "cycles": [dict(vars(record)) for record in self._records],
        }

    def _write(self, records: Sequence[CycleRecord]) -> None:
        ledger = Ledger(self.folder, self.base_fingerprint, records)
        with atomic_path(self.folder / LEDGER_FILE) as temporary:
            write_compact_json(temporary, ledger.to_dict())


def _cycle_file(cycle: int) -> str:
    return f"cycle-{cycle:05d}.safetensors"


def _link(chain: str, sha256: str) -> str:
    return hashlib.sha256((chain + sha256).encode()).hexdigest()


def _check_header(path: Path, handle: Any, layers: Layers) -> None:
    shapes = {
        layer.mora_matrix: layer.operator.adapter_weight_shape
        for layer in layers.values()
    }
    if set(handle.keys()) != shapes.keys():
        raise UserError(f"{path} does not hold the matrices that its header lists")
    for name, shape in shapes.items():
        if shape_dtype(handle, name) != (shape, torch.float32):
            raise UserError(f"{path}: {name} is not fp32 {shape}")


def _write_cycle(
    path: Path,
    cycle: int,
    step: int,
    layers: Layers,
    mora_matrices: Iterable[tuple[str, Tensor]],
) -> None:
    layout = {
        layer.mora_matrix: (layer.operator.adapter_weight_shape, torch.float32)
        for layer in layers.values()
    }
    metadata = {
        "layers": json.dumps(layers_to_dict(layers)),
        "cycle": str(cycle),
        "step": str(step),
    }
    with SafetensorsWriter(path, layout, metadata) as writer:
        for module, mora_matrix in mora_matrices:
            if not torch.isfinite(mora_matrix).all():
                raise RunError(
                    f"step {step}: {layers[module].mora_matrix} is not finite and cannot be merged"
                )
            writer.write(layers[module].mora_matrix, mora_matrix)
