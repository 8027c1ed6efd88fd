"""Writes a Hugging Face folder from a base: weights tensor by tensor, config.json,
tokenizer and other files.

keys of the base -> layout_of (shapes only) -> write_shards (one tensor in memory) ->
write_companions (other files)
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.common.files import read_json, write_json_atomic
from mora_ds.common.tensor_files import SafetensorsWriter, dtype_name, tensor_nbytes
from mora_ds.models.base import INDEX_FILE, BaseCheckpoint
from mora_ds.models.rope import change_file

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Key -> shape and dtype."""

COPIED_FROM_BASE = (
    "generation_config.json",
    "*.py",
    "LICENSE*",
    "vocabulary_extension.json",
)
"""Sampling settings, remote code, license, and the record of a vocabulary extension."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
)


_OF_MODEL = (*COPIED_FROM_BASE, *TOKENIZER_FILES, "config.json", "README.md")


def is_of_model(path: Path) -> bool:
    """Whether a file has a name that an export writes."""
    patterns = (*_OF_MODEL, "*.safetensors", INDEX_FILE)
    return path.is_file() and any(map(path.match, patterns))


def layout_of(
    base: BaseCheckpoint,
    keys: Iterable[str],
    dtype: torch.dtype | None,
    in_fp32: Collection[str] = (),
) -> Layout:
    """Shapes and dtypes of the tensors `keys` of a base. Floating-point tensors have
    `dtype` (None: as stored), those in `in_fp32` fp32."""
    layout: Layout = {}
    for key in keys:
        shape, stored = base.shape_dtype(key)
        if dtype is not None and stored.is_floating_point:
            stored = torch.float32 if key in in_fp32 else dtype
        layout[key] = (shape, stored)
    return layout


SHARD_BYTES = 5 << 30
"""Maximum size of a weight file, unless a single tensor is larger."""


def write_shards(
    folder: Path,
    layout: Layout,
    tensor_of: Callable[[str, torch.dtype], Tensor],
) -> tuple[str, ...]:
    """Write the safetensors files, of at most `SHARD_BYTES` unless a single tensor is
    larger, and an index if there are several. Returns the names of the files.

    `tensor_of(key, dtype)`: returns a tensor in the dtype of the layout; called
    directly before the tensor is written.
    """
    split = split_state_dict_into_shards_factory(
        layout,
        get_storage_size=lambda entry: tensor_nbytes(*entry),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for name, keys in split.filename_to_tensors.items():
        shard = {key: layout[key] for key in keys}
        with SafetensorsWriter(folder / name, shard, {}) as writer:
            for key in keys:
                writer.write(key, tensor_of(key, layout[key][1]))
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        index = {"metadata": split.metadata, "weight_map": weight_map}
        write_json_atomic(folder / INDEX_FILE, index)
    return tuple(split.filename_to_tensors)


def write_companions(
    base: BaseCheckpoint,
    folder: Path,
    dtype: torch.dtype | None,
    tokenizer: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json with a new dtype (None: unchanged) and `changes` of the text
    config, the base's other files, and a tokenizer (None: the base's)."""
    config = read_json(base.folder / "config.json")
    if dtype is not None:
        _set_dtype(config, dtype_name(dtype))
        config.setdefault("dtype", dtype_name(dtype))
    change_file(config, changes or {})
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    _copy(base.folder, folder, COPIED_FROM_BASE)
    _copy(tokenizer or base.folder, folder, ("*",) if tokenizer else TOKENIZER_FILES)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set all dtypes in the config, in place (`torch_dtype`: transformers 4)."""
    for name, value in config.items():
        if name in ("dtype", "torch_dtype"):
            config[name] = dtype
        elif name.endswith("_config") and isinstance(value, dict):
            _set_dtype(value, dtype)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                _require_inside(path, source)
                shutil.copyfile(path, target / path.name)


def _require_inside(path: Path, folder: Path) -> None:
    """Raise `UserError` for a link that leads out of `folder`: an untrusted base could
    copy any file into the model. Allowed are links of the Hub's cache from
    snapshots/REVISION to ../../blobs."""
    if path.is_symlink():
        resolved = path.resolve()
        root = folder.resolve()
        allowed = (root, root.parent.parent / "blobs")
        if not any(resolved.is_relative_to(parent) for parent in allowed):
            raise UserError(
                f"{path} is a link to {resolved}, outside of the folder, and is not copied: replace it by the file"
            )
