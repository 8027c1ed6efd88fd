"""The adapter's files in a checkpoint: the MoRA matrices of the current cycle, other
trained tensors, and their base.

Three files, each written atomically; merged cycles are in the merge ledger, a folder of
its own (`remora.ledger`).

    adapter.json          AdapterFile: config, layers and operators of the current cycle, dtype, cycle, step, facts
    adapter.safetensors   "<module name>.mora_matrix" fp32 (r_hat, r_hat) (LoRA: ".factors", (rank, d_in + d_out));
                          other trained tensors (modules_to_save) fp32, by parameter name; with domains
                          "<module name>.domain_mora_matrices" fp32 (K, r_hat, r_hat), in the order of adapter.json
    base.json             BaseReference: folder, fingerprint, and parameter name -> key in its safetensors
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import PlainValidator
from torch import Tensor

from mora_ds.adapters.config import AdapterConfig, config_from_dict
from mora_ds.adapters.domain_names import SHARED
from mora_ds.adapters.domains import OWN
from mora_ds.adapters.ops.mora import OperatorSpec, operator_of
from mora_ds.adapters.registry import adapter_type, spec_from_dict
from mora_ds.checkpoint.layout import (
    ADAPTER_JSON,
    ADAPTER_PARTS,
    ADAPTER_TENSORS,
    BASE_JSON,
    LEDGER_FOLDER,
    PROBE_FILE,
    STATE_FILE,
    TOKENIZER_FOLDER,
)
from mora_ds.common.errors import UserError
from mora_ds.common.files import (
    FORMAT,
    MANIFEST,
    JsonObject,
    malformed,
    read_formatted,
    verify_manifest,
    write_json_atomic,
)
from mora_ds.common.tensor_files import (
    Shape,
    Tensors,
    compute_dtype,
    open_safetensors,
    shape_dtype,
    write_safetensors_atomic,
)
from mora_ds.common.untrusted import (
    AnyPath,
    Count,
    FileName,
    entry,
    is_url,
    typed,
    typed_fully,
)
from mora_ds.models.base import MODEL_FLAG, BaseCheckpoint
from mora_ds.models.rope import check_changes
from mora_ds.remora.ledger import (
    Layers,
    Ledger,
    agree_on_layers,
    layers_from_dict,
    layers_to_dict,
)


def _operator_from_dict(values: JsonObject) -> OperatorSpec:
    return operator_of(spec_from_dict(values), "a domain")


@dataclass(frozen=True)
class DomainMatrices:
    """The entry "domains" of adapter.json: matrices on top of the shared ones."""

    names: tuple[FileName, ...]
    """The domains, in the order of their matrices."""
    operators: dict[
        FileName, Annotated[OperatorSpec, PlainValidator(_operator_from_dict)]
    ]
    """Module name -> operator of its matrices, that of cycle 0."""

    def to_dict(self) -> JsonObject:
        operators = {name: spec.to_dict() for name, spec in self.operators.items()}
        return {"names": list(self.names), "operators": operators}

    @staticmethod
    def tensor(module: str) -> str:
        """The name of a layer's matrices in safetensors files."""
        return f"{module}.{OWN}"


def chosen_domain(
    domains: DomainMatrices | None, wanted: str | None, flag: str
) -> str | None:
    """The domain that a user names; None for `shared`, and for an adapter without
    domains. Raises `UserError` where none is named or it is unknown."""
    if domains is None and wanted is None:
        return None
    known = () if domains is None else (*domains.names, SHARED)
    if wanted not in known:
        raise UserError(
            f"{flag} {wanted}: name a domain of this adapter, which has {', '.join(known) or 'none'}"
        )
    return None if wanted == SHARED else wanted


def logits_name(domain: str | None) -> str:
    """The name of recorded logits in probe.safetensors; None: without a domain."""
    return "logits" if domain is None else f"logits.{domain}"


@dataclass(frozen=True)
class AdapterFile:
    """adapter.json: everything about an adapter except its tensors."""

    layers: Annotated[Layers, PlainValidator(layers_from_dict)]
    """Module name -> entry, with the operators of the current cycle."""
    config: Annotated[AdapterConfig, PlainValidator(config_from_dict)]
    dtype: str
    """Compute dtype of the live model: "float32", "bfloat16" or "float16"."""
    cycle: Count
    """Number of the current, unmerged cycle: the number of cycles in the ledger."""
    step: Count
    """Optimizer steps done."""
    trainables: tuple[FileName, ...] = ()
    """Names of other trained parameters (modules_to_save): embeddings, norms, head."""
    facts: JsonObject = field(default_factory=dict)
    """Anything else worth recording."""
    domains: DomainMatrices | None = None

    def to_dict(self) -> JsonObject:
        return {
            "format": FORMAT,
            **vars(self),
            "config": self.config.to_dict(),
            "layers": layers_to_dict(self.layers),
            "domains": None if self.domains is None else self.domains.to_dict(),
        }

    def expected(self) -> dict[str, Shape]:
        """Name -> shape of every MoRA matrix in the file, those of domains included."""
        shapes: dict[str, Shape] = {
            layer.mora_matrix: layer.operator.adapter_weight_shape
            for layer in self.layers.values()
        }
        if self.domains is not None:
            count = len(self.domains.names)
            for module, spec in self.domains.operators.items():
                shapes[self.domains.tensor(module)] = (
                    count,
                    *spec.adapter_weight_shape,
                )
        return shapes

    def check_ledger(self, ledger: Ledger) -> None:
        """Raises `UserError` unless the layers are those of the ledger's cycles, and
        follow the last of them. The ledger lies in the adapter's folder."""
        known: Layers = dict(self.layers)
        for cycle, record in enumerate(ledger.records):
            agree_on_layers(known, ledger.layers(cycle), ledger.folder / record.file)
        if ledger.cycles != self.cycle:
            path = ledger.folder.parent / ADAPTER_JSON
            raise UserError(
                f"{ledger.folder} has {ledger.cycles} cycles, but {path} was written in cycle {self.cycle}"
            )


def write_adapter(
    folder: Path,
    adapter: AdapterFile,
    mora_matrices: Tensors,
    trained: Tensors,
    domain_mora_matrices: Tensors | None = None,
) -> None:
    """Writes adapter.safetensors in fp32, then adapter.json, each atomically. Raises
    `RunError` on a full disk. Arguments as of `adapter_tensors`."""
    stored = adapter_tensors(adapter, mora_matrices, trained, domain_mora_matrices)
    write_safetensors_atomic(
        folder / ADAPTER_TENSORS, stored, {"step": str(adapter.step)}
    )
    write_json_atomic(folder / ADAPTER_JSON, adapter.to_dict())


def adapter_tensors(
    adapter: AdapterFile,
    mora_matrices: Tensors,
    trained: Tensors,
    domain_mora_matrices: Tensors | None = None,
) -> Tensors:
    """What adapter.safetensors holds, in fp32.

    `mora_matrices`: module name -> (r_hat, r_hat), for exactly `adapter.layers`. `trained`:
    parameter name -> tensor, for exactly `adapter.trainables`. `domain_mora_matrices`: module
    name -> (K, r_hat, r_hat), where there are domains.
    """
    tensors = {
        adapter.layers[name].mora_matrix: mora_matrix
        for name, mora_matrix in mora_matrices.items()
    }
    tensors.update(trained)
    for name, stack in (domain_mora_matrices or {}).items():
        tensors[DomainMatrices.tensor(name)] = stack
    if set(tensors) != {*adapter.expected(), *adapter.trainables}:
        raise ValueError("the tensors given are not those that the adapter lists")
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


def read_adapter(folder: Path) -> AdapterFile:
    """Reads adapter.json. Raises `UserError` naming it where it is missing, damaged or
    of an unknown format."""
    path = folder / ADAPTER_JSON
    content = read_formatted(path)
    with malformed(path):
        config = entry(content, "config", JsonObject, ADAPTER_JSON)
        # An adapter that is not registered here is no damage
        adapter_type(entry(config, "kind", str, "the adapter's settings"))
        adapter: AdapterFile = typed_fully(
            AdapterFile, content, f"{ADAPTER_JSON} is damaged"
        )
        compute_dtype(adapter.dtype)
        if adapter.domains is not None:
            lonely = adapter.layers.keys() ^ adapter.domains.operators.keys()
            if lonely:
                raise UserError(
                    f"domains: {min(lonely)} has no matrix, or none that is shared"
                )
    return adapter


class AdapterTensors:
    """Reads adapter.safetensors, one tensor at a time, in fp32 on the CPU."""

    def __init__(self, folder: Path, adapter: AdapterFile) -> None:
        """Checks names, shapes and dtypes against `adapter`. Raises `UserError` naming
        the file and the tensor."""
        path = folder / ADAPTER_TENSORS
        handle = open_safetensors(path)
        shapes = adapter.expected()
        if differing := set(handle.keys()) ^ (set(shapes) | set(adapter.trainables)):
            raise UserError(
                f"{path} and {ADAPTER_JSON} do not list the same tensors, e.g. {min(differing)}"
            )
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            shape, dtype = shape_dtype(handle, name)
            if dtype != torch.float32 or shape != shapes.get(name, shape):
                raise UserError(
                    f"{path}: {name} is {shape} {dtype}, which does not fit {ADAPTER_JSON}"
                )
        self._handle = handle
        self._adapter = adapter

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything in the file, by the names of parameters."""
        for name in self._handle.keys():  # noqa: SIM118
            yield name, self._handle.get_tensor(name)

    def mora_matrix(self, module: str) -> Tensor:
        """The MoRA matrix (or LoRA's factors) of the current cycle."""
        return self._handle.get_tensor(self._adapter.layers[module].mora_matrix)

    def domain_mora_matrix(self, module: str, domain: str) -> Tensor:
        """(r_hat, r_hat): the matrix of one domain."""
        domains = self._adapter.domains
        assert domains is not None
        index = domains.names.index(domain)
        mora_matrices = self._handle.get_slice(domains.tensor(module))
        return mora_matrices[index : index + 1].squeeze(0)

    def trained(self, name: str) -> Tensor:
        """Another trained tensor."""
        return self._handle.get_tensor(name)

    def trained_shape(self, name: str) -> Shape:
        """The shape of another trained tensor, from the file's header alone."""
        return shape_dtype(self._handle, name)[0]


@dataclass(frozen=True)
class BaseReference:
    """base.json: a checkpoint's base, and what parameters are called in its files."""

    folder: AnyPath
    """A URL, absolute, or relative to base.json, for a base that moves with its run."""
    fingerprint: str
    keys: dict[FileName, str]
    """Parameter name -> safetensors key."""
    dtype: str
    """Compute dtype that the base is cast to when it is loaded."""
    config_changes: JsonObject = field(default_factory=dict)
    """Settings in which the live model differs from the base's config.json."""

    def __post_init__(self) -> None:
        """Raises `UserError` as `check_changes` does: what is refused when it is read
        is not written either."""
        check_changes(self.config_changes)

    def to_dict(self) -> JsonObject:
        """What base.json holds."""
        return {"format": FORMAT, **vars(self)}

    def write(self, folder: Path) -> None:
        """Writes base.json atomically."""
        write_json_atomic(folder / BASE_JSON, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> BaseReference:
        """Raises `UserError` naming base.json where it is missing, damaged or of an
        unknown format."""
        path = folder / BASE_JSON
        content = read_formatted(path)
        reference: BaseReference = typed(cls, content, f"{path} is damaged")
        with malformed(path):
            compute_dtype(reference.dtype)
        return reference

    def absolute(self, checkpoint: Path) -> BaseReference:
        """The same reference for a copy of base.json in another folder."""
        return replace(self, folder=str(self.place(checkpoint)))

    def place(self, checkpoint: Path) -> Path | str:
        """The path or URL of the base of a checkpoint."""
        if is_url(self.folder):
            return self.folder
        return (checkpoint.resolve() / self.folder).resolve()

    def open_base(
        self, checkpoint: Path, override: Path | None = None, flag: str = MODEL_FLAG
    ) -> BaseCheckpoint:
        """Opens the base, or `override`, and compares its fingerprint over all bytes.

        Raises `UserError` naming `flag` when it is missing or another one.
        """
        base = BaseCheckpoint.open(override or self.place(checkpoint), flag)
        self.require_base(base, checkpoint, flag)
        return base

    def require_base(self, base: BaseCheckpoint, checkpoint: Path, flag: str) -> None:
        """Raises `UserError` naming `flag` where `base` has another fingerprint, for
        which every byte is read."""
        if base.fingerprint() != self.fingerprint:
            raise UserError(
                f"{flag}: {base.folder} is not the base of {checkpoint}: its weights have the fingerprint"
                f" {base.fingerprint()}, those of the run {self.fingerprint}"
            )


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: alone, or that of a checkpoint. Make it with
    `Adapter.open`."""

    folder: Path
    file: AdapterFile
    tensors: AdapterTensors
    ledger: Ledger
    reference: BaseReference

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read the files of an adapter and compare them with their manifest, if there
        is one. Of what a checkpoint has besides only the sizes are compared: the
        engine's shards are larger by far. Raises `UserError`."""
        has_manifest = (folder / MANIFEST).exists()
        read = (*ADAPTER_PARTS, TOKENIZER_FOLDER, PROBE_FILE, STATE_FILE)
        if has_manifest and (problems := verify_manifest(folder, read)):
            raise UserError(f"{folder} is damaged: {'; '.join(problems)}")
        file = read_adapter(folder)
        reference = BaseReference.read(folder)
        # The manifest has hashed the cycles
        ledger = Ledger.open(
            folder / LEDGER_FOLDER, reference.fingerprint, hashes=not has_manifest
        )
        file.check_ledger(ledger)
        return cls(folder, file, AdapterTensors(folder, file), ledger, reference)

    def original_key(self, base: BaseCheckpoint, name: str) -> str:
        """What a parameter is called in the files of `base`. Raises `UserError` where
        they hold no such tensor."""
        key = self.reference.keys.get(name)
        if key is None or key not in base:
            raise UserError(
                f"{self.folder / BASE_JSON} names no tensor of {base.folder} for {name}"
            )
        return key
