"""Reads the files of DeepSpeed in a checkpoint, which are pickles, as plain data: nothing in them is executed.

Before anything is unpickled: the file is an uncompressed zip archive, and its pickle names only what DeepSpeed pickles.
PyTorch's `weights_only` alone also makes objects whose size the file states, such as a bytearray of many GiB. After it:
no tensor is larger than the file, and nothing contains itself.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import shown

_MAX_PICKLE = 1 << 26
"""Bytes of the pickle itself, which holds names, shapes and settings, but no tensor's contents."""
_MAX_DEPTH, _MAX_OBJECTS = 32, 10_000_000
"""How deep containers may be nested, and how many objects there may be, those that are reached twice counted twice."""


class _Attributes:
    """Stand-in for an object of DeepSpeed, of which a reader sees the attributes only."""


STAND_INS: list[Any] = [
    (_Attributes, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Attributes, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Attributes, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""All that DeepSpeed 0.19.8 pickles in addition to tensors and containers (tests/checkpoint/test_elastic.py)."""

_TENSORS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.nn.parameter.Parameter",
    "torch.storage.UntypedStorage",
}
_TYPES = {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def load_pickled(path: Path, allowed: list[Any] | None = None) -> Any:
    """The content of a file of DeepSpeed, memory-mapped, on the CPU. Raises `UserError` naming the file.

    `allowed`: classes that objects in it may have, or (stand-in, name of the class); by default `STAND_INS`.
    """
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is missing")
    classes = STAND_INS if allowed is None else allowed
    try:
        _check_archive(path, {_name_of(each) for each in classes})
        with torch.serialization.safe_globals(classes):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _count(content, path.stat().st_size, {}, 0)
    except UserError as error:
        raise UserError(f"{path} cannot be read as plain data: {error}") from error
    except Exception as error:  # the unpickler, given any bytes, raises any error
        raise UserError(f"{path} cannot be read as plain data: {_reason(error)}") from error
    return content


def _name_of(allowed: Any) -> str:
    return allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"


def _reason(error: Exception) -> str:
    """In a line; without PyTorch's advice to load the file with weights_only=False, which would execute it."""
    line = (str(error).strip().splitlines() or [""])[0]
    return type(error).__name__ if not line or "weights_only" in line else line[:200]


def _check_archive(path: Path, classes: set[str]) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for each in entries:
            if each.compress_type != zipfile.ZIP_STORED or each.file_size > size:
                raise UserError(f"{shown(each.filename)} in it is compressed")
        pickles = [each for each in entries if each.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
            raise UserError(f"it has {len(pickles)} pickles, or one of more than {_MAX_PICKLE:,} bytes")
        data = archive.read(pickles[0])
    known = _TENSORS | _TYPES | classes
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise UserError(f"it has the opcode {opcode.name}, which torch.save does not write")
        if opcode.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            if name not in known and not (name.startswith("torch.") and name.endswith("Storage")):
                raise UserError(f"it holds an object of the class {shown(name)}, which is no plain data")


def _count(value: Any, size: int, seen: dict[int, int], depth: int) -> int:
    """Number of objects in `value`. Raises `UserError` for what no file of `size` bytes can hold."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.layout is not torch.strided or value.is_quantized:
            raise UserError("a tensor in it is not a plain one")
        if max(value.numel() * value.element_size(), value.untyped_storage().nbytes()) > size:
            raise UserError(f"a tensor of shape {tuple(value.shape)} is larger than the file")
        return 1
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"the number {shown(value)} is out of bounds")
    if isinstance(value, _Attributes):
        value = vars(value)
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if depth > _MAX_DEPTH:
        raise UserError(f"it is nested more than {_MAX_DEPTH} deep")
    if id(value) not in seen:
        children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        seen[id(value)] = 1 + sum(_count(child, size, seen, depth + 1) for child in children)
    if seen[id(value)] > _MAX_OBJECTS:
        raise UserError(f"it holds more than {_MAX_OBJECTS:,} objects")
    return seen[id(value)]
