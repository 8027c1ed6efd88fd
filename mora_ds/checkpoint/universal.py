"""Converts checkpoints to DeepSpeed's universal checkpoints and back. Offline, without DeepSpeed.

    folder/latest_universal                             the tag
    folder/TAG/mp_rank_00_model_states.pt               counters (the same file for ZeRO-3: zero_pp_rank_0_...)
    folder/TAG/zero/optimizer_state.pt                  settings of the parameter groups, the step count
    folder/TAG/zero/PARAMETER/fp32.pt, exp_avg.pt, ...  complete tensors, {"param": tensor}; step.pt
    folder/TAG/mora/                                    merge ledger, adapter, base.json, state, tokenizer, layout

Plain DeepSpeed loads it with `"checkpoint": {"load_universal": true}` and `load_checkpoint(folder)`, under ZeRO 1 to 3
and with any number of ranks; without ZeRO DeepSpeed has no loader for it. Merged weights are not in it, but follow
from `mora/ledger`. Two limits of DeepSpeed 0.19.8: ZeRO-3 reads exp_avg and exp_avg_sq only, so not Muon's momentum;
and all sub-groups share one step tensor, which is then incremented once for each.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mora_ds.checkpoint.adapter_files import AdapterTensors, read_adapter, write_adapter
from mora_ds.checkpoint.layout import ADAPTER_JSON, ENGINE_TAG, STATE_FILE, find_checkpoint, step_folder
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import UserError
from mora_ds.common.files import (
    MANIFEST,
    atomic_folder,
    copy_folder,
    verify_manifest,
    write_json_atomic,
    write_manifest,
)
from mora_ds.common.untrusted import file_name, read_text, require_plain, shown
from mora_ds.engine.pickled import load_pickled
from mora_ds.engine.shard_index import Layout, ShardIndex, layout_path
from mora_ds.engine.shard_reader import MASTER, EngineShards, typed_tensor, write_whole

OURS = "mora"
LATEST_UNIVERSAL = "latest_universal"
ZERO_FOLDER = "zero"
OPTIMIZER_STATE = "optimizer_state.pt"
_FP32 = "fp32"
FORMAT_VERSION = 0.4
"""deepspeed/checkpoint/constants.py, UNIVERSAL_CHECKPOINT_VERSION_VALUE."""
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""DeepSpeed reads one of them, depending on the ZeRO stage that loads it (engine.py, `_get_ckpt_name`)."""


def to_universal(checkpoint: Path, output: Path) -> list[str]:
    """Writes a universal checkpoint to the new folder `output`. Returns lines to print.

    Raises `UserError` for a checkpoint that is damaged, or `output` that exists.
    """
    checkpoint = find_checkpoint(checkpoint).resolve()
    _require(checkpoint, output)
    shards, state = EngineShards.open(checkpoint / ENGINE_TAG), TrainerState.read(checkpoint)
    if shards.first.swapped:
        raise UserError(f"{shards.folder}: an optimizer's state on NVMe cannot be converted")
    with atomic_folder(output.absolute()) as folder:
        place = step_folder(folder, state.step)
        tag = place.name
        for name in shards.shapes:
            _write_parameter(_parameter_folder(place / ZERO_FOLDER, name), name, shards)
        torch.save(_optimizer_state(shards), place / ZERO_FOLDER / OPTIMIZER_STATE)
        for file in _MODEL_FILES:
            torch.save(_model_state(shards, state), place / file)
        copy_folder(checkpoint, place / OURS, without=(ENGINE_TAG, MANIFEST))
        write_json_atomic(layout_path(place / OURS, 0), replace(shards.first, flats=[], moments=[]).to_dict())
        write_manifest(place)
        (folder / LATEST_UNIVERSAL).write_text(tag, encoding="utf-8")
    return [f"wrote {output}: tag {tag}, {len(shards.shapes)} parameters, ZeRO 1 to 3, any number of ranks"]


def from_universal(folder: Path, output: Path) -> list[str]:
    """Writes a checkpoint to the new folder `output`, from a universal one that `to_universal` made. Any number of
    ranks can resume from it. Returns lines to print.

    Raises `UserError` for any other universal checkpoint, and where DeepSpeed has trained further and saved over it.
    """
    place = _tagged(folder)
    if not (place / OURS / STATE_FILE).is_file():
        raise UserError(
            f"{place} has no folder {OURS}: only what convert_checkpoint.py universal has made can be converted"
        )
    _require(place, output)
    shards = _Universal(place)
    counted = _counted_steps(place / _MODEL_FILES[0])
    if counted != shards.first.counters.get("global_steps"):
        raise UserError(
            f"{place} was trained further ({counted} steps): its ledger and data position are of an earlier step"
        )
    with atomic_folder(output.absolute()) as target:
        target.rmdir()  # an empty folder, which the copy makes anew
        copy_folder(place / OURS, target, without=(layout_path(place / OURS, 0).name, ENGINE_TAG, MANIFEST))
        (target / ENGINE_TAG).mkdir()
        write_whole(target / ENGINE_TAG, shards, TrainerState.read(target).world_size)
        if (target / ADAPTER_JSON).is_file():
            _write_adapter(target, shards)
        write_manifest(target)
    return [f"wrote {output}: {len(shards.shapes)} parameters, resume with --resume_from_checkpoint {output}"]


def _require(checkpoint: Path, output: Path) -> None:
    require_plain(checkpoint)
    if problems := verify_manifest(checkpoint):
        raise UserError(f"{checkpoint} is damaged: {'; '.join(problems)}")
    if output.is_symlink() or output.exists():
        raise UserError(f"--output {output} exists already; name a new folder")


def _tagged(folder: Path) -> Path:
    latest = folder / LATEST_UNIVERSAL
    if not latest.is_file():
        raise UserError(f"{folder} is no universal checkpoint: it has no file {LATEST_UNIVERSAL}")
    return folder / file_name(read_text(latest, 4096).strip(), f"{latest}: the tag")


def _counted_steps(path: Path) -> Any:
    content = load_pickled(path)
    return content.get("global_steps") if isinstance(content, dict) else None


def _write_adapter(folder: Path, shards: EngineShards) -> None:
    """Makes adapter.safetensors hold the masters, as in any checkpoint. Frozen tensors have none and stay."""
    adapter = read_adapter(folder)
    domains = adapter.domains
    names = () if domains is None else domains.frozen
    frozen = {name: value.clone() for name, value in AdapterTensors.open(folder, adapter).items() if name in names}

    def tensor(name: str) -> Tensor:
        return frozen[name] if name in frozen else shards.whole(name, MASTER)

    for name, shape in adapter.expected().items():
        if name not in frozen and shards.shapes.get(name) != shape:
            raise UserError(f"{folder}: {name} is {shape} in {ADAPTER_JSON}, {shards.shapes.get(name)} in the shards")
    squares = {name: tensor(entry.square) for name, entry in adapter.layers.items()}
    stacks = {} if domains is None else {name: tensor(domains.tensor(name)) for name in domains.operators}
    write_adapter(folder, adapter, squares, {name: tensor(name) for name in adapter.trainables}, stacks)


# -- DeepSpeed's files -------------------------------------------------------------------------------------------------


def _write_parameter(folder: Path, name: str, shards: EngineShards) -> None:
    folder.mkdir(parents=True)
    for key in (MASTER, *shards.keys(name)):
        torch.save({"param": shards.whole(name, key)}, folder / _file_of(name, key))
    for key, value in shards.scalars(name).items():
        torch.save(value, folder / _file_of(name, key))


def _parameter_folder(folder: Path, name: str) -> Path:
    """Names of parameters and keys of their state come from the checkpoint, and become names of files here."""
    if file_name(name, "the name of a parameter") == OPTIMIZER_STATE:
        raise UserError(f"a parameter cannot be called {name}")
    return folder / name


def _file_of(name: str, key: str) -> str:
    if key == MASTER:
        return f"{_FP32}.pt"
    if key == _FP32:
        raise UserError(f"{name}: {key} is the name of its master, and cannot be a key of the optimizer's state")
    return file_name(f"{key}.pt", f"{name}: a key of the optimizer's state")


def _optimizer_state(shards: EngineShards) -> dict[str, Any]:
    """The file that ZeRO 1 and 2 read; its entry "optimizer_state_dict" is what ZeRO-3 reads."""
    names = [next(iter(group), "") for group in shards.first.groups]
    if "" in names:
        raise UserError(f"{shards.folder}: a parameter group is empty")
    groups = [{**settings, "params": [index]} for index, settings in enumerate(shards.first.settings)]
    state = {index: shards.scalars(name) for index, name in enumerate(names)}
    return {
        "ds_version": version("deepspeed"),
        "param_groups": groups,
        "optimizer_state_dict": {"state": state, "param_groups": groups},
    }


def _model_state(shards: EngineShards, state: TrainerState) -> dict[str, Any]:
    return {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in shards.first.groups],
        "lr_scheduler": None,
        **shards.first.counters,
        "dp_world_size": state.world_size,
        "mp_world_size": 1,
        "ds_version": version("deepspeed"),
        "universal_checkpoint_info": {"universal_checkpoint_version": FORMAT_VERSION},
    }


class _Universal(EngineShards):
    """Reads a universal checkpoint through the interface of `EngineShards`."""

    def __init__(self, place: Path) -> None:
        first = Layout.read(place / OURS, 0)
        empty = np.empty((0, 6), np.int64)
        bare = replace(first, flats=[], moments=[], transposed=[])
        super().__init__(place / ZERO_FOLDER, ShardIndex(bare, [first.file], empty, empty))

    def _file(self, name: str, key: str) -> Any:
        path = _parameter_folder(self.folder, name) / _file_of(name, key)
        content = load_pickled(path)
        if isinstance(content, dict):
            return typed_tensor(content.get("param"), f"{path}: param")
        if not isinstance(content, (Tensor, int, float)):
            raise UserError(f"{path} must hold a tensor or a number, got {shown(content)}")
        return content

    def _stored(self, name: str) -> dict[str, Any]:
        keys = sorted(path.stem for path in _parameter_folder(self.folder, name).glob("*.pt") if path.stem != _FP32)
        return {key: self._file(name, key) for key in keys if key != MASTER}

    def keys(self, name: str, start: int = 0, numel: int | None = None) -> list[str]:
        del start, numel
        return [key for key, value in self._stored(name).items() if isinstance(value, Tensor) and value.dim()]

    def scalars(self, name: str, start: int = 0, numel: int | None = None) -> dict[str, Any]:
        del start, numel
        keys = self.keys(name)
        return {key: value for key, value in self._stored(name).items() if key not in keys}

    def _read(self, name: str, key: str, start: int, numel: int | None) -> Tensor:
        tensor = typed_tensor(self._file(name, key), f"{self.folder / name}: {key}")
        if tuple(tensor.shape) != self.shapes[name]:
            raise UserError(f"{self.folder / name}: {key} is {tuple(tensor.shape)}, not {self.shapes[name]}")
        return tensor.reshape(-1).narrow(0, start, tensor.numel() if numel is None else numel).clone()
