"""MoRA adapters of kongds's fork of PEFT, and of axolotl, read as adapters of mora_ds.

    adapter_config.json            use_mora, mora_type, r, base_model_name_or_path
    adapter_model.safetensors      "base_model.model.<module>.lora_A.weight" (r_hat, r_hat); lora_B is the same module

An adapter means what its forward pass computes
(peft-mora/src/peft/tuners/lora/layer.py, `_apply_mora`): an operator of mora_ds with a
grouping that never changes, and the matrix lora_A without a scale. Where inputs have
more blocks than outputs, type 6 computes blocks that no output takes; that is refused,
as is all that is more than matrices.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.checkpoint.adapter_files import AdapterFile, BaseReference, write_adapter
from mora_ds.checkpoint.layout import LEDGER_FOLDER
from mora_ds.common.errors import UserError, unknown
from mora_ds.common.fetched import with_urls
from mora_ds.common.files import (
    JsonObject,
    as_path,
    atomic_folder,
    read_json,
    require_new,
    write_manifest,
)
from mora_ds.common.tensor_files import (
    Tensors,
    dtype_name,
    open_safetensors,
    shape_dtype,
)
from mora_ds.common.untrusted import Count, entry
from mora_ds.deploy.peft_export import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from mora_ds.models.base import BaseCheckpoint, map_model
from mora_ds.models.load import folder_config, make_model
from mora_ds.remora.ledger import LayerEntry, Layers, Ledger

TYPES = {
    1: (OperatorKind.SHARE, Grouping.STRIDED),
    2: (OperatorKind.SHARE, Grouping.CONTIGUOUS),
    3: (OperatorKind.SHARE, Grouping.CONTIGUOUS_STRIDED),
    4: (OperatorKind.SHARE, Grouping.STRIDED_CONTIGUOUS),
    6: (OperatorKind.ROTATE, Grouping.PLAIN),
}
"""`mora_type` -> the operator that computes the same. 5 does not exist."""

_LEFT_OUT = ("use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication")
"""Settings that add to the matrices, or by which the fork merges not what it
computes."""


def convert_fork(
    path: Path | str, output: Path | str, base_folder: Path | str | None = None
) -> list[str]:
    """Write the fork's adapter in the folder `path` to the new folder `output` as an
    adapter of mora_ds. `base_folder`: the base, if it is not the folder that the
    adapter names. Returns lines to print. Raises `UserError` naming the file and what
    is not read."""
    path = as_path(path, "convert_fork: `path`")
    output = as_path(output, "convert_fork: `output`")
    require_new(output)
    source = path / CONFIG_FILE
    settings = read_json(source)
    kind, grouping = _operator(settings, source)
    weights = open_safetensors(path / WEIGHTS_FILE)
    sides = _sides(weights, path / WEIGHTS_FILE)
    flag = "`base_folder`"
    if base_folder is None:
        base_folder = entry(settings, "base_model_name_or_path", str, source)
    base = BaseCheckpoint.open(base_folder, flag)
    with torch.device("meta"):
        model = make_model(folder_config(base.folder, flag=flag), flag)
    keys = map_model(base, model, dict(model.named_parameters(remove_duplicate=False)))
    layers: Layers = {}
    for module, side in sides.items():
        weight = f"{module}.weight"
        shape = base.shape_dtype(keys[weight])[0] if weight in keys else ()
        if len(shape) != 2:
            raise UserError(
                f"{path / WEIGHTS_FILE}: {base.folder} has no linear layer {module}"
            )
        d_out, d_in = shape
        if side > max(d_in, d_out):
            raise UserError(
                f"{path / WEIGHTS_FILE}: a matrix of side {side} is too large for {module} of "
                f"{base.folder}, which has {d_in} inputs and {d_out} outputs"
            )
        spec = OperatorSpec(kind, d_in, d_out, side, grouping)
        if spec.blocks_in > spec.blocks_out and kind is OperatorKind.ROTATE:
            raise UserError(
                f"{source}: mora_type 6 leaves inputs of {module} ({d_in} inputs, {d_out} outputs) without any effect,"
                " which no operator of mora_ds does: such an adapter cannot be read"
            )
        layers[module] = LayerEntry(module, False, spec)
    adapter_config = MoRAConfig(
        rank=entry(settings, "r", Count, source),
        operator=kind.value,
        grouping=grouping.value,
        layer_sizes=tuple(sides.items()),
    )
    mora_matrices = _matrices(weights, path / WEIGHTS_FILE)
    dtype = dtype_name(base.shape_dtype(keys[next(iter(layers.values())).weight])[1])
    adapter = AdapterFile(
        layers,
        adapter_config,
        dtype,
        cycle=0,
        step=0,
        facts={"converted from": str(path)},
    )
    with atomic_folder(output.absolute()) as partial:
        Ledger.create(partial / LEDGER_FOLDER, base.fingerprint())
        write_adapter(partial, adapter, mora_matrices, {})
        BaseReference(with_urls(base.folder), base.fingerprint(), keys, dtype).write(
            partial
        )
        write_manifest(partial)
    contents = f"{len(layers)} layers, {kind.value}/{grouping.value}"
    return [f"wrote {output}: {contents}, of the base {base.folder}"]


def _operator(settings: JsonObject, source: Path) -> tuple[OperatorKind, Grouping]:
    """The operator of an adapter_config.json. Raises `UserError` for what is not
    read."""
    if not settings.get("use_mora"):
        raise UserError(
            f"{source} is not of MoRA (use_mora): merge the adapter with PEFT, and adapt that model"
        )
    if unread := [name for name in _LEFT_OUT if settings.get(name)]:
        raise UserError(f"{source}: {unread[0]} is not read with use_mora")
    mora_type = entry({"mora_type": 1, **settings}, "mora_type", int, source)
    if mora_type not in TYPES:
        raise UserError(
            f"{source}: {unknown('mora_type', str(mora_type), map(str, TYPES))}"
        )
    return TYPES[mora_type]


def _sides(file: Any, path: Path) -> dict[str, int]:
    """Module name -> r_hat, by the header: a small file can claim any size."""
    sides = {}
    for name in sorted(file.keys()):
        shape, _ = shape_dtype(file, name)
        module, _, ending = name.removeprefix(PREFIX).rpartition(".lora_")
        if ending == "A.weight" and len(shape) == 2 and shape[0] == shape[1]:
            sides[module] = shape[0]
        # Sorted, lora_A comes before lora_B, which is the same matrix once more.
        elif ending != "B.weight" or shape != (sides.get(module),) * 2:
            raise UserError(
                f"{path}: {name} {shape} is no matrix of MoRA, and is not read"
            )
    return sides


def _matrices(file: Any, path: Path) -> Tensors:
    """Module name -> M (r_hat, r_hat), of the tensors of `_sides`. Raises `UserError` where
    lora_B is another matrix."""
    mora_matrices: Tensors = {}
    for name in sorted(file.keys()):
        module, _, ending = name.removeprefix(PREFIX).rpartition(".lora_")
        tensor = file.get_tensor(name).float()
        if ending == "A.weight":
            mora_matrices[module] = tensor
        elif not torch.equal(tensor, mora_matrices[module]):
            raise UserError(
                f"{path}: {name} {tuple(tensor.shape)} is no matrix of MoRA, and is not read"
            )
    if not mora_matrices:
        raise UserError(f"{path} holds no matrix")
    return mora_matrices


@contextmanager
def read_fork(path: Path, base_folder: Path | None) -> Iterator[Path]:
    """What `convert_fork` makes of the fork's adapter at `path`, in a temporary folder;
    `path` itself where it is no folder of PEFT."""
    if not (path / CONFIG_FILE).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mora_ds-") as scratch:
        output = Path(scratch) / "adapter"
        convert_fork(path, output, base_folder)
        yield output
