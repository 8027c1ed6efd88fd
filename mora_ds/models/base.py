"""The base weights on disk: a Hugging Face folder, only read and never written.

    folder -> BaseCheckpoint -> fingerprint          identifies the base, independent of its shards and its path
                             -> map_model            parameter name -> key in the files
                             -> read(key)            one tensor, memory-mapped, in its stored dtype

Each parameter of a run's model must equal one tensor of the files, cast to the run's
dtype, or a stack of them, as for the experts of a mixture (`stored_names`). Otherwise
(only pickled files, weights that transformers converts at load, a new model from a
config) `WeightMappingError` is raised, and the caller can save the model in memory as a base
with `write_own_base`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.fetched import local
from mora_ds.common.files import atomic_folder, read_json, stat_signature
from mora_ds.common.tensor_files import (
    Shape,
    Tensors,
    dtype_name,
    open_safetensors,
    shape_dtype,
    tensor_checksum,
    tensor_nbytes,
)
from mora_ds.common.untrusted import FileName, entry
from mora_ds.models.stored_names import (
    is_stack,
    members_of,
    renamed_keys,
    stacked_files,
)
from mora_ds.runtime.ranks import Ranks, balanced

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"
MODEL_FLAG = "--model_name_or_path"


class WeightMappingError(UserError):
    """The tensors of the folder and the parameters of the model do not match one to
    one."""


class BaseChanged(RunError):
    """The base's files were changed after they were opened and mapped."""


class BaseCheckpoint:
    """The safetensors of a model folder, read only. Create with
    `BaseCheckpoint.open`."""

    def __init__(self, folder: Path, file_of: Mapping[str, Path]) -> None:
        self.folder = folder
        self._file_of = dict(file_of)
        self._members: dict[str, list[list[str]]] = {}
        self._fingerprint: str | None = None
        self.stat_signatures = {path: stat_signature(path) for path in self.files()}
        """The stat signature of each file when it was last known to be unchanged."""

    @classmethod
    def open(
        cls,
        folder: Path | str,
        flag: str = MODEL_FLAG,
        quantized: bool = False,
    ) -> BaseCheckpoint:
        """Open a folder with config.json and either model.safetensors or an index and
        its shards. `quantized`: accept quantized weights.

        Raises `UserError` that names `flag` and the invalid file, and its subclass
        `WeightMappingError` if there are only pickled weights.
        """
        folder = local(folder, flag).absolute()
        if not folder.is_dir():
            raise UserError(f"{flag}: no such folder: {folder}")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{flag}: {folder} is not a model folder: it has no config.json"
            )
        try:
            settings = read_json(folder / "config.json").get("quantization_config")
            if settings is not None and not quantized:
                raise UserError(
                    f"{folder} has quantized weights; give the unquantized model, or OUTPUT_DIR/base of a run"
                )
            file_of = _locate_tensors(folder)
            if stacks := [key for key in file_of if is_stack(key)]:
                raise UserError(
                    f"{file_of[stacks[0]]} is damaged: a tensor is called {stacks[0]!r}"
                )
            return cls(folder, file_of)
        except WeightMappingError:
            raise
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error

    def keys(self) -> list[str]:
        """Names of all tensors, in file order."""
        return list(self._file_of)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of or bool(is_stack(key) and self.members(key))

    def files(self) -> list[Path]:
        """The safetensors files."""
        return list(dict.fromkeys(self._file_of.values()))

    def changed_files(self) -> list[Path]:
        """Files whose size, time or inode changed since they were opened. Reads no
        contents."""
        return [
            path
            for path, before in self.stat_signatures.items()
            if stat_signature(path) != before
        ]

    def require_unchanged(self, fingerprint: str) -> None:
        """Raise `BaseChanged` if `changed_files` have other weights. The files are
        mapped: writing to one changes weights in memory, and truncating one causes a
        bus error when it is read.

        Files that were only touched, moved or copied are accepted: they are read once,
        and must have this `fingerprint`.
        """
        if changed := self.changed_files():
            self._require_weights(fingerprint, changed[0])

    def _require_weights(self, fingerprint: str, changed: Path) -> None:
        stat_signatures = {path: stat_signature(path) for path in self.stat_signatures}
        try:
            is_same = BaseCheckpoint.open(self.folder).fingerprint() == fingerprint
        except (UserError, RunError):
            is_same = False
        if not is_same:
            raise BaseChanged(
                f"{changed} was changed or replaced during the run, which reads its weights from there: the model "
                "in memory is no longer the one that was trained. Restore the original file and resume"
            )
        logger.info(
            "%s: files were touched, but their weights are unchanged", self.folder
        )
        self.stat_signatures = stat_signatures

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of all tensors, read from the file headers."""
        return {self.shape_dtype(key)[1] for key in self._file_of}

    def shape_dtype(self, key: str) -> tuple[Shape, torch.dtype]:
        """Shape and dtype of a tensor, read from the file header."""
        if not is_stack(key):
            return shape_dtype(self._handles[self._file_of[key]], key)
        members = self.members(key)
        first, dtype = self.shape_dtype(members[0][0])
        rows = sum(self.shape_dtype(member_key)[0][0] for member_key in members[0])
        return (len(members), rows, *first[1:]), dtype

    def read(self, key: str) -> Tensor:
        """The tensor as stored, on the CPU. Do not write to it: it is the mapped file.

        A stack is copied from its tensors. Raises `RunError` if the file was damaged
        after it was opened.
        """
        if is_stack(key):
            shape, dtype = self.shape_dtype(key)
            stack = torch.empty(shape, dtype=dtype)
            for index, expert_keys in enumerate(self.members(key)):
                torch.cat([self.read(name) for name in expert_keys], out=stack[index])
            return stack
        try:
            return self._handles[self._file_of[key]].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{self._file_of[key]}: cannot read {key!r}: {error}"
            ) from error

    def members(self, key: str) -> list[list[str]]:
        """The keys of a stack's tensors: for each expert those that are concatenated
        along their rows. Empty if the files do not have them."""
        if key not in self._members:
            members = members_of(key, self._file_of)
            shapes = [[self.shape_dtype(name) for name in names] for names in members]
            if any(of_expert != shapes[0] for of_expert in shapes):
                raise UserError(
                    f"{self.folder}: the experts of {key!r} have different shapes"
                )
            self._members[key] = members
        return self._members[key]

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        if changed := self.changed_files():
            raise BaseChanged(
                f"{changed[0]} was changed or replaced during the run: restore the original file and resume"
            )
        return {path: open_safetensors(path) for path in self.stat_signatures}

    def release(self) -> None:
        """Unmap the files, because pages that were read count as memory of this process.
        The next `read` maps them again. Tensors from `read` stay valid."""
        vars(self).pop("_handles", None)

    def fingerprint(self, ranks: Ranks | None = None) -> str:
        """Hex sha256 of the tensors' names, dtypes, shapes and checksums, independent
        of the files' shards.

        The first call reads every byte, at about memory speed. With `ranks` it is
        collective, and each rank reads a part of the tensors.
        """
        if ranks is not None and ranks.world > 1:
            self._fingerprint = ranks.run_on_rank0(
                "known fingerprint of the base", lambda: self._fingerprint
            )
        if self._fingerprint is None:
            if ranks is None:
                lines = self._lines(self._file_of)
            else:
                sizes = {
                    key: tensor_nbytes(*self.shape_dtype(key)) for key in self._file_of
                }
                slices = balanced(sizes, ranks.world)
                by_rank = ranks.map(lambda rank: self._lines(slices[rank]), len(slices))
                lines = [line for rank_lines in by_rank for line in rank_lines]
            text = "".join(sorted(lines))
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprint

    def _lines(self, keys: Iterable[str]) -> list[str]:
        """A line with the checksum of each tensor."""
        lines = []
        for key in keys:
            tensor = self.read(key)
            shape = "x".join(map(str, tensor.shape))
            lines.append(
                f"{key} {dtype_name(tensor.dtype)} {shape} {tensor_checksum(tensor):016x}\n"
            )
        return lines


def _locate_tensors(folder: Path) -> dict[str, Path]:
    """Key -> file. Opens every file, to report a missing or truncated one early."""
    single = folder / SINGLE_FILE
    index = folder / INDEX_FILE
    if single.is_file():
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if not index.is_file():
        names = sorted(path.name for path in folder.iterdir())
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        if PICKLED_INDEX in names:
            # transformers follows the names in it
            _weight_map(folder / PICKLED_INDEX)
        if pickled:
            raise WeightMappingError(
                f"{folder} has no safetensors, only pickled weights ({', '.join(pickled[:3])})"
            )
        raise UserError(
            f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}"
        )
    weight_map = _weight_map(index)
    if not weight_map:
        raise UserError(f"{index} is damaged: its weight_map is empty")
    keys_of = {
        shard: set(open_safetensors(folder / shard).keys())
        for shard in sorted(set(weight_map.values()))
    }
    for key, shard in weight_map.items():
        if key not in keys_of[shard]:
            raise UserError(
                f"{folder / shard} has no tensor {key!r}, although {INDEX_FILE} lists it"
            )
    return {key: folder / shard for key, shard in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> name of its file in the folder, of an index."""
    files: dict[str, str] = entry(
        read_json(index), "weight_map", dict[str, FileName], index
    )
    return files


def map_model(base: BaseCheckpoint, model: Any, names: Iterable[str]) -> dict[str, str]:
    """Parameter name -> key, for `names` of a transformers model. The key may be the
    name, with or without the base model's prefix; a key that transformers renames or
    stacks at load; or the key of a tied parameter. Raises `WeightMappingError` that lists
    names without a key."""
    # Tied parameter -> the parameter that owns the storage
    ties = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    stored = base.keys()
    keys = {
        **stacked_files(model, stored),
        **renamed_keys(model, stored),
        **{key: key for key in stored},
    }
    prefix = f"{model.base_model_prefix}."

    def key_of(name: str) -> str | None:
        alias = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        return keys.get(name, keys.get(alias))

    mapping: dict[str, str] = {}
    missing = []
    for name in names:
        source = ties.get(name, name)
        tied = [target for target, owner in ties.items() if owner == source]
        key = next(filter(None, map(key_of, (source, name, *tied))), None)
        if key is None:
            missing.append(name)
        else:
            mapping[name] = key
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise WeightMappingError(
            f"{base.folder} has no tensor for {len(missing)} parameter(s) of the model: {some}"
        )
    return mapping


def write_own_base(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    state_dict: Tensors | None = None,
) -> BaseCheckpoint:
    """Save a transformers model (before injection) as a base, with the parameter names
    of the model.

    Replaces `folder` atomically. `state_dict`: required if the model's weights are
    sharded. Raises `RunError` on a full disk.
    """
    weights = {} if state_dict is None else {"state_dict": dict(state_dict)}
    with atomic_folder(folder) as partial:
        model.save_pretrained(
            partial, max_shard_size="5GB", save_original_format=False, **weights
        )
        # The library ignores the umask and makes weights readable for this user only
        for path in partial.glob("*.safetensors"):
            path.chmod((partial / "config.json").stat().st_mode)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return BaseCheckpoint.open(folder)


def verify_against_model(
    base: BaseCheckpoint,
    mapping: Mapping[str, str],
    tensors: Tensors,
    names: Iterable[str],
) -> None:
    """Check that every named tensor is bit-identical to its base tensor after a cast.
    Raises `WeightMappingError` that names the first difference."""
    for name in names:
        tensor = tensors[name].detach()
        key = mapping[name]
        stored, _ = base.shape_dtype(key)
        if stored != tuple(tensor.shape):
            raise WeightMappingError(
                f"{name} is {tuple(tensor.shape)} in the model, {stored} in {base.folder}"
            )
        base_tensor = base.read(key).to(tensor.device, tensor.dtype)
        if not _same_bits(tensor, base_tensor):
            raise WeightMappingError(
                f"{name} of the model is not the tensor {key!r} of {base.folder}"
            )


def _same_bits(one: Tensor, another: Tensor) -> bool:
    """Whether two tensors of one dtype are bit-identical: NaN equals itself, 0 differs
    from -0."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    word = words[one.itemsize]
    return torch.equal(one.view(word), another.view(word))
