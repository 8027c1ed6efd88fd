"""What a checkpoint holds beside the ledger: the live squares, the other trained tensors, and which base they are for.

Three files, each written atomically:

    adapter.json          AdapterFile: layers and operators of the current cycle, dtype, cycle, step, rank, facts
    adapter.safetensors   "<module name>.square" fp32 (r_hat, r_hat) (LoRA: ".factors", (rank, d_in + d_out));
                          other trained tensors fp32, by parameter name
    base.json             BaseReference: folder, fingerprint, and parameter name -> key in its safetensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.base import MODEL_FLAG, BaseCheckpoint
from mora_ds.errors import UserError
from mora_ds.files import malformed, read_json, require_format, write_json_atomic
from mora_ds.ledger import LayerEntry, layers_from_dict, layers_to_dict
from mora_ds.tensor_files import compute_dtype, open_safetensors, shape_dtype, write_safetensors_atomic
from mora_ds.updates import value_shape

ADAPTER_JSON = "adapter.json"
ADAPTER_TENSORS = "adapter.safetensors"
BASE_JSON = "base.json"


@dataclass(frozen=True)
class AdapterFile:
    """adapter.json: everything about the adapter but its numbers."""

    layers: dict[str, LayerEntry]
    """Module name -> entry, with the operators of the current cycle."""
    dtype: str
    """Compute dtype of the live model: "float32", "bfloat16" or "float16"."""
    cycle: int
    """Number of the current, unmerged cycle = number of cycles in the ledger."""
    step: int
    rank: int
    """LoRA-equivalent rank (`--mora_rank`)."""
    trainables: tuple[str, ...] = ()
    """Parameter names of the other trained tensors (embeddings, norms, head)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Anything else worth telling; written at the top level of the JSON, and read back from there."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.facts,
            "format": 1,
            "layers": layers_to_dict(self.layers),
            "trainables": list(self.trainables),
            "dtype": self.dtype,
            "cycle": self.cycle,
            "step": self.step,
            "rank": self.rank,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterFile:
        """Raises `KeyError` for what is missing and `UserError` for an unknown operator or dtype."""
        rest = dict(values)
        rest.pop("format", None)
        compute_dtype(rest["dtype"])
        return cls(
            layers=layers_from_dict(rest.pop("layers")),
            dtype=rest.pop("dtype"),
            cycle=int(rest.pop("cycle")),
            step=int(rest.pop("step")),
            rank=int(rest.pop("rank")),
            trainables=tuple(rest.pop("trainables")),
            facts=rest,
        )


def write_adapter(
    folder: Path, adapter: AdapterFile, squares: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> None:
    """Writes adapter.safetensors, then adapter.json, each atomically.

    `squares`: module name -> (r_hat, r_hat), for exactly `adapter.layers`. `trained`: parameter name -> tensor, for
    exactly `adapter.trainables`. All are stored in fp32. Raises `RunError` on a full disk.
    """
    tensors = {adapter.layers[name].square: square.detach().float() for name, square in squares.items()}
    tensors.update({name: tensor.detach().float() for name, tensor in trained.items()})
    if set(squares) != set(adapter.layers) or set(trained) != set(adapter.trainables):
        raise ValueError("the tensors given are not those that the adapter lists")
    write_safetensors_atomic(folder / ADAPTER_TENSORS, tensors, {"step": str(adapter.step)})
    write_json_atomic(folder / ADAPTER_JSON, adapter.to_dict())


def adapter_folder(path: Path) -> Path | None:
    """The folder with adapter.json that `path` means: itself, what it links to, or a run's latest checkpoint."""
    for folder in (path, path / "checkpoints" / "latest", path / "latest"):
        if (folder / ADAPTER_JSON).is_file():
            return folder.resolve()
    return None


def read_adapter(folder: Path) -> AdapterFile:
    """Raises `UserError` naming adapter.json where it is missing, damaged or of an unknown format."""
    path = folder / ADAPTER_JSON
    content = read_json(path)
    require_format(path, content)
    with malformed(path):
        return AdapterFile.from_dict(content)


class AdapterTensors:
    """Reads adapter.safetensors, tensor by tensor. Make one with `AdapterTensors.open`."""

    def __init__(self, handle: Any, adapter: AdapterFile) -> None:
        self._handle = handle
        self._adapter = adapter

    @classmethod
    def open(cls, folder: Path, adapter: AdapterFile) -> AdapterTensors:
        """Checks names, shapes and dtypes against `adapter`. Raises `UserError` naming the file and the tensor."""
        path = folder / ADAPTER_TENSORS
        handle = open_safetensors(path)
        shapes = {entry.square: value_shape(entry.operator) for entry in adapter.layers.values()}
        if differing := set(handle.keys()) ^ (set(shapes) | set(adapter.trainables)):
            raise UserError(f"{path} and {ADAPTER_JSON} do not list the same tensors, e.g. {min(differing)}")
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            shape, dtype = shape_dtype(handle, name)
            if dtype != torch.float32 or shape != shapes.get(name, shape):
                raise UserError(f"{path}: {name} is {shape} {dtype}, which does not fit {ADAPTER_JSON}")
        return cls(handle, adapter)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor on the CPU) of everything in the file; names are those of the model's parameters."""
        for name in self._handle.keys():  # noqa: SIM118
            yield name, self._handle.get_tensor(name)

    def square(self, module: str) -> Tensor:
        """fp32 on the CPU: the live square (or factors) of the current cycle."""
        return self._handle.get_tensor(self._adapter.layers[module].square)

    def trained(self, name: str) -> Tensor:
        """Another trained tensor, fp32 on the CPU."""
        return self._handle.get_tensor(name)

    def trained_shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the header alone."""
        return shape_dtype(self._handle, name)[0]


@dataclass(frozen=True)
class BaseReference:
    """base.json: which base a checkpoint is for, and how the live parameters are called in its files."""

    folder: str
    """Absolute, or relative to the folder of base.json (for a base that moves along with its run)."""
    fingerprint: str
    keys: dict[str, str]
    """Parameter name -> safetensors key."""
    dtype: str
    """Compute dtype that the base is cast to when it is loaded."""

    def write(self, folder: Path) -> None:
        """Writes base.json atomically."""
        content = {"format": 1, "folder": self.folder, "fingerprint": self.fingerprint}
        write_json_atomic(folder / BASE_JSON, {**content, "dtype": self.dtype, "keys": self.keys})

    @classmethod
    def read(cls, folder: Path) -> BaseReference:
        """Raises `UserError` naming base.json where it is missing, damaged or of an unknown format."""
        path = folder / BASE_JSON
        content = read_json(path)
        require_format(path, content)
        with malformed(path):
            compute_dtype(content["dtype"])
            return cls(str(content["folder"]), str(content["fingerprint"]), dict(content["keys"]), content["dtype"])

    def open_base(self, checkpoint: Path, override: Path | None = None, flag: str = MODEL_FLAG) -> BaseCheckpoint:
        """Opens the base, from `override` where it lies elsewhere now, and checks that it is the same one.

        Reads every byte of it. Raises `UserError` naming `flag` when it is not there or not the same.
        """
        place = override if override is not None else checkpoint.resolve() / self.folder
        base = BaseCheckpoint.open(place, flag)
        if base.fingerprint() != self.fingerprint:
            raise UserError(
                f"{flag}: {base.folder} is not the base of {checkpoint}: its weights have the fingerprint"
                f" {base.fingerprint()}, those of the run {self.fingerprint}"
            )
        return base
