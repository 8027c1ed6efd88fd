"""What a checkpoint holds beside the ledger: the live squares, the other trained tensors, and which base they are for.

Three files, each written atomically:

    adapter.json          AdapterFile: layers and operators of the current cycle, dtype, cycle, step, rank, facts
    adapter.safetensors   "<module name>.square" fp32 (r_hat, r_hat) (LoRA: ".factors", (rank, d_in + d_out));
                          other trained tensors fp32, by parameter name; with domains
                          "<module name>.domain_squares" fp32 (K, r_hat, r_hat), in the order of adapter.json
    base.json             BaseReference: folder, fingerprint, and parameter name -> key in its safetensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.config import SHARED
from mora_ds.adapters.domains import OWN
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.ops.update import spec_from_dict
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_TENSORS, BASE_JSON
from mora_ds.errors import UserError, nearest
from mora_ds.files import malformed, read_json, require_format, write_json_atomic
from mora_ds.models.base import MODEL_FLAG, BaseCheckpoint
from mora_ds.models.tensor_files import compute_dtype, open_safetensors, shape_dtype, write_safetensors_atomic
from mora_ds.remora.ledger import LayerEntry, layers_from_dict, layers_to_dict


@dataclass(frozen=True)
class OwnSquares:
    """What adapter.json says of the squares of domains, beside the shared ones in `AdapterFile.layers`."""

    names: tuple[str, ...]
    """Of the domains, in the order of the squares."""
    operators: Mapping[str, UpdateSpec]
    """Module name -> what its squares mean: never merged in mid-run, they stay wired as in cycle 0."""
    frozen: tuple[str, ...] = ()
    """Names of the tensors that are not trained, shared ones or those of domains."""

    def to_dict(self) -> dict[str, Any]:
        operators = {name: spec.to_dict() for name, spec in self.operators.items()}
        return {"names": list(self.names), "operators": operators, "frozen": list(self.frozen)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OwnSquares:
        operators = {name: spec_from_dict(spec) for name, spec in values["operators"].items()}
        return cls(tuple(values["names"]), operators, tuple(values["frozen"]))

    def tensor(self, module: str) -> str:
        """The name of a layer's squares in safetensors files."""
        return f"{module}.{OWN}"

    def index(self, domain: str, flag: str) -> int:
        """Raises `UserError` that lists the domains."""
        if domain not in self.names:
            raise UserError(f"{flag} {domain}: {_there_are(self.names)}.{nearest(domain, self.names)}")
        return self.names.index(domain)


def _there_are(names: tuple[str, ...]) -> str:
    return f"there are the domains {', '.join(names)}, and {SHARED} for the shared squares alone"


def chosen_domain(own: OwnSquares | None, wanted: str | None, flag: str) -> str | None:
    """The domain that a user names; None: of none. Raises `UserError` where one must be named and is not, or is
    another's."""
    if own is None:
        if wanted is not None:
            raise UserError(f"{flag} {wanted}: this adapter has no domains")
        return None
    if wanted is None:
        raise UserError(f"{flag}: which of them? {_there_are(own.names)}")
    if wanted != SHARED:
        own.index(wanted, flag)
    return None if wanted == SHARED else wanted


def logits_of(domain: str | None) -> str:
    """The name of a domain's recorded logits (None: the shared function's) in probe.safetensors."""
    return "logits" if domain is None else f"logits.{domain}"


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
    own: OwnSquares | None = None
    """Of domains, where there are any."""

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
            **({} if self.own is None else {"domains": self.own.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterFile:
        """Raises `KeyError` for what is missing and `UserError` for an unknown operator or dtype."""
        rest = dict(values)
        rest.pop("format", None)
        compute_dtype(rest["dtype"])
        own = rest.pop("domains", None)
        return cls(
            own=None if own is None else OwnSquares.from_dict(own),
            layers=layers_from_dict(rest.pop("layers")),
            dtype=rest.pop("dtype"),
            cycle=int(rest.pop("cycle")),
            step=int(rest.pop("step")),
            rank=int(rest.pop("rank")),
            trainables=tuple(rest.pop("trainables")),
            facts=rest,
        )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every square in adapter.safetensors, those of domains included."""
        shapes: dict[str, tuple[int, ...]] = {
            entry.square: entry.operator.value_shape for entry in self.layers.values()
        }
        if self.own is not None:
            for module, spec in self.own.operators.items():
                shapes[self.own.tensor(module)] = (len(self.own.names), *spec.value_shape)
        return shapes


def write_adapter(
    folder: Path,
    adapter: AdapterFile,
    squares: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes adapter.safetensors, then adapter.json, each atomically.

    `squares`: module name -> (r_hat, r_hat), for exactly `adapter.layers`. `trained`: parameter name -> tensor, for
    exactly `adapter.trainables`. `own`: module name -> (K, r_hat, r_hat), where there are domains. All are stored in
    fp32. Raises `RunError` on a full disk.
    """
    tensors = {adapter.layers[name].square: square.detach().float() for name, square in squares.items()}
    tensors.update({name: tensor.detach().float() for name, tensor in trained.items()})
    tensors.update({f"{name}.{OWN}": tensor.detach().float() for name, tensor in (own or {}).items()})
    if set(tensors) != {*adapter.expected(), *adapter.trainables}:
        raise ValueError("the tensors given are not those that the adapter lists")
    write_safetensors_atomic(folder / ADAPTER_TENSORS, tensors, {"step": str(adapter.step)})
    write_json_atomic(folder / ADAPTER_JSON, adapter.to_dict())


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
        shapes = adapter.expected()
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

    def own(self, module: str) -> Tensor | None:
        """(K, r_hat, r_hat) fp32 on the CPU: the squares of all domains, where there are any."""
        own = self._adapter.own
        return None if own is None else self._handle.get_tensor(own.tensor(module))

    def own_square(self, module: str, domain: str) -> Tensor:
        """(r_hat, r_hat), of one of them."""
        own = self._adapter.own
        assert own is not None
        index = own.index(domain, "domain")
        return self._handle.get_slice(own.tensor(module))[index : index + 1].squeeze(0)

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
