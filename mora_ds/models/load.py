"""Load the base: a Hugging Face folder or hub name -> (model, its original tensors on disk, which is which).

Every rank reads the same files, whole; nothing here shards. The originals stay on disk for exact merging, so a base
whose files do not hold the live tensors one to one (pickled weights, tensors fused at load, a model made from a config)
is written once, under the live names, to a folder of the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.errors import UserError
from mora_ds.models.base import BaseCheckpoint, NotOneToOne, map_model, verify_against_model, write_own_base
from mora_ds.runtime.ranks import Ranks

MODEL_FLAG = "--model_name_or_path"


@dataclass
class LoadedBase:
    """A live model and where its original tensors lie."""

    model: Any
    base: BaseCheckpoint
    keys: dict[str, str]
    """Parameter name -> key in `base`."""


def resolve_folder(name: str, ranks: Ranks) -> Path:
    """The local folder of a model: itself, or a snapshot of the hub's repository. Collective. Raises `UserError`."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{MODEL_FLAG} {name}: the folder has no config.json, so it is no Hugging Face model")
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{MODEL_FLAG} {name}: no such folder")
    ranks.agree(lambda: _download(name) if ranks.is_local_first else None)
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):  # an older model, such as facebook/opt-125m
            folder = Path(snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin"]))
        return folder
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{MODEL_FLAG} {name}: neither a folder here nor a hub model that can be had: {reason}"
        ) from error


def load_base(
    folder: Path,
    own_base: Path,
    ranks: Ranks,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool = False,
    share: Callable[[Path], None] | None = None,
) -> LoadedBase:
    """The live model in `dtype` on the CPU, and the original of each of its parameters.

    `own_base` is where rank 0 writes the base if its files are not one to one; `share` then brings it to nodes that do
    not see it. Raises `UserError` where weights are
    missing or do not fit the config.
    """
    model = _from_pretrained(folder, dtype, attn_implementation, trust_remote_code)
    is_own, keys = ranks.on_first(lambda: _originals(model, folder, own_base))
    if is_own and share is not None:
        share(own_base)
    return LoadedBase(model, BaseCheckpoint.open(own_base if is_own else folder), keys)


def create_base(
    config_file: Path, folder: Path, seed: int, tokenizer: Any = None, vocab_size: int | None = None
) -> Path:
    """A base with fresh random weights from a config JSON, written to `folder` in fp32. One rank calls it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(read_model_config(config_file, vocab_size), dtype=torch.float32)
    write_own_base(model, folder, tokenizer)
    return folder


def read_model_config(config_file: Path, vocab_size: int | None = None) -> Any:
    """The config of a JSON such as `configs/models/tiny_llama.json`. Raises `UserError` naming --model_config."""
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--model_config {config_file}: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"--model_config {config_file}: no model_type in it")
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    try:
        return AutoConfig.for_model(**values)
    except ValueError as error:
        raise UserError(f"--model_config {config_file}: {error}") from error


def folder_config(folder: Path | str, trust_remote_code: bool = False) -> Any:
    """The config of a model folder. Raises `UserError` naming --model_name_or_path."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{MODEL_FLAG} {folder}: its config.json cannot be used: {reason}") from error


def named_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a model folder, a hub name or a config JSON; no weights are looked for. Raises `UserError`."""
    path = Path(name).expanduser()
    return (
        read_model_config(path) if path.is_file() else folder_config(path if path.is_dir() else name, trust_remote_code)
    )


_NOT_THE_FUNCTION = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "problem_type", "id2label", "label2id", "chunk_size_feed_forward",
}  # fmt: skip
"""Settings of a config that change with place, library or call, and not what the model computes."""


def config_digest(config: Any) -> str:
    """16 hex digits for what a model's config says of what the model computes: the weights' fingerprint does not see
    another rope_theta or number of heads."""
    values = {name: value for name, value in config.to_dict().items() if name not in _NOT_THE_FUNCTION}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _from_pretrained(
    folder: Path, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool
) -> nn.Module:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, and named
        )
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds; all mean that the folder is no model
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "attn_implementation" in str(error) or "flash" in reason.lower():
            raise UserError(f"--attn_implementation {attn_implementation}: {reason}") from error
        reason = _damaged_file(folder) or reason
        raise UserError(f"{MODEL_FLAG} {folder}: cannot be loaded as a causal language model: {reason}") from error
    model, info = loaded
    for what, problem in (
        ("missing_keys", "weights are missing"),
        ("mismatched_keys", "weights do not fit the config"),
    ):
        if info.get(what):
            some = ", ".join(str(key) for key in list(info[what])[:3])
            raise UserError(f"{MODEL_FLAG} {folder}: {problem} for {len(info[what])} tensors, e.g. {some}")
    return model


def _damaged_file(folder: Path) -> str:
    """Which file of the weights is truncated or missing, "" for none; transformers does not always say."""
    try:
        BaseCheckpoint.open(folder)
    except NotOneToOne:
        return ""
    except UserError as error:
        return str(error).removeprefix(f"{MODEL_FLAG}: ")
    return ""


def _originals(model: Any, folder: Path, own_base: Path) -> tuple[bool, dict[str, str]]:
    """(whether they are in `own_base`, keys) of the originals; writes it when the model's own files will not do."""
    try:
        return False, _map_and_verify(model, BaseCheckpoint.open(folder))
    except NotOneToOne:
        return True, _map_and_verify(model, write_own_base(model, own_base))


def _map_and_verify(model: Any, base: BaseCheckpoint) -> dict[str, str]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    keys = map_model(base, model, tensors)
    verify_against_model(base, keys, tensors, tensors)
    return keys
