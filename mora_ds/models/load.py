"""Loads the base: a Hugging Face folder or Hub name -> the model in memory, its tensors on
disk, and the names of both.

Every rank reads all files. Exact merging reads the base weights from disk again. So if
the files do not match the model's parameters one to one (pickled weights, tensors fused
at load, a model created from a config), the base is written once to the run's folder,
with the parameter names of the model.
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import deepspeed as hf_deepspeed

from mora_ds.common.attributes import replaced
from mora_ds.common.errors import UserError, reason
from mora_ds.common.fetched import local
from mora_ds.common.files import config_names
from mora_ds.common.rope import FLAG as ROPE
from mora_ds.common.tensor_files import COMPUTE_DTYPES, dtype_name
from mora_ds.common.untrusted import MAX_BYTES, is_url, parse_json, read_text
from mora_ds.models.base import (
    MODEL_FLAG,
    BaseCheckpoint,
    WeightMappingError,
    map_model,
    verify_against_model,
    write_own_base,
)
from mora_ds.models.rope import check_used, rope_changes, with_changes
from mora_ds.runtime.nodes import write_on_rank0
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


CONFIGS = ("*.json", "*.model", "*.txt", "*.py", "*.jinja")
"""Patterns of a model's files, but for its weights."""


@dataclass
class LoadedBase:
    """A model in memory and its base weights on disk."""

    model: Any
    base: BaseCheckpoint
    keys: dict[str, str]
    """Parameter name -> key in `base`."""


def resolve_folder(name: str, ranks: Ranks) -> Path:
    """The folder `name`, or the folder of a downloaded Hub repository. Collective.

    Raises `UserError` if there is neither, or if only some ranks see the folder.
    """
    folder = ranks.agree("folder of the model", lambda: local_folder(name), long=True)
    kind = "no folder, so a name on the Hub" if folder is None else "a folder"
    if folder is not None and is_url(name):
        # Which version of it: it may have changed between two nodes
        kind = f"version {folder.parent.name}"
    ranks.same("the model", {f"{MODEL_FLAG} is": kind})
    if folder is not None:
        return folder
    ranks.agree(
        "download of the model",
        lambda: download_model(name) if ranks.is_local_rank0 else None,
        long=True,
    )
    return ranks.agree("downloaded model", lambda: download_model(name))


def local_folder(name: str) -> Path | None:
    """The folder `name`; None if `name` can only be a name on the Hub."""
    folder = local(name, MODEL_FLAG)
    is_model = (folder / "config.json").is_file()
    is_gguf = folder.suffix == ".gguf" and folder.exists()
    if not is_model and (is_gguf or any(folder.glob("*.gguf"))):
        raise UserError(
            f"{MODEL_FLAG} {name}: GGUF is not supported: give the unquantized model that it was created from"
        )
    if folder.is_dir():
        if not is_model:
            raise UserError(
                f"{MODEL_FLAG} {name}: the folder has no config.json, so it is not a Hugging Face model"
            )
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{MODEL_FLAG} {name}: no such folder")
    return None


def download_model(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", *CONFIGS]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            # Older models, such as facebook/opt-125m, have only pickled weights
            wanted.append("pytorch_model*.bin")
            folder = Path(snapshot_download(name, allow_patterns=wanted))
        return folder
    except (OSError, HFValidationError, ValueError) as error:
        raise UserError(
            f"{MODEL_FLAG} {name}: not a folder, and not available on the Hub: {reason(error)}"
        ) from error


def load_base(
    folder: Path,
    own_base: Path,
    ranks: Ranks,
    dtype: torch.dtype,
    attn_implementation: str | None,
    trust_remote_code: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> LoadedBase:
    """Load the model in `dtype` on the CPU, and open its base weights. Collective.

    `changes`: applied to the folder's config (`rope_changes`). If the files do not
    match the parameters one to one, rank 0 writes the base to `own_base`, in the
    precision of the files. Raises `UserError` if weights are missing or do not fit the
    config.
    """
    load = partial(
        load_model,
        folder,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        changes=changes,
    )
    model = ranks.agree("loading of the model", lambda: load(dtype), long=True)
    keys, difference = _compare_with_files(model, folder, ranks)
    base_folder = folder
    if difference:
        write = partial(
            original_tensors, model, folder, own_base, dtype, load, difference
        )
        keys = write_on_rank0(ranks, "base of the run", own_base, write)
        base_folder = own_base
    base = ranks.agree("files of the model", lambda: BaseCheckpoint.open(base_folder))
    return LoadedBase(model, base, keys)


def create_base(
    config_file: Path,
    folder: Path,
    seed: int,
    tokenizer: Any,
    vocab_size: int,
) -> Path:
    """Write a base with random fp32 weights from a config JSON. On one rank only."""
    torch.manual_seed(seed)
    config = read_model_config(config_file, vocab_size)
    model = make_model(config, f"--model_config {config_file}", dtype=torch.float32)
    write_own_base(model, folder, tokenizer)
    return folder


def read_model_config(
    config_file: Path,
    vocab_size: int | None = None,
    flag: str = "--model_config",
) -> Any:
    """The config in a JSON file such as `configs/models/tiny_llama.json`. Raises
    `UserError` that names `flag`."""
    try:
        values = parse_json(read_text(config_file))
    except FileNotFoundError as error:
        packaged = ", ".join(f"configs/{name}" for name in config_names("models"))
        raise UserError(
            f"{flag} {config_file}: no such file; mora_ds comes with {packaged}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {config_file}: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{flag} {config_file}: it has no model_type")
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:
        # The checks of config classes raise any error
        raise UserError(f"{flag} {config_file}: {reason(error)}") from error
    return _checked_sizes(config, f"{flag} {config_file}")


def folder_config(
    folder: Path | str,
    trust_remote_code: bool = False,
    flag: str = MODEL_FLAG,
) -> Any:
    """The config of a model folder. Raises `UserError` that names `flag`."""
    _check_folder(Path(folder), flag)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # The checks of config classes raise any error
        if "trust_remote_code" in str(error):
            # The library's advice is for Python callers
            why = "it needs its remote code: allow it with --trust_remote_code"
        elif isinstance(error.__cause__, HFValidationError):
            # Transformers found no such folder and tried it as a name on the Hub
            why = "no such folder, and not a valid name on the Hub"
        else:
            why = f"its config.json cannot be used: {reason(error)}"
        raise UserError(f"{flag} {folder}: {why}") from error
    return _checked_sizes(config, f"{flag} {folder}: its config.json cannot be used")


def _check_folder(folder: Path, flag: str) -> None:
    """Raise `UserError` for pipes and devices in a model folder, which transformers would
    read without end, and for a huge config.json. Links may lead to the Hub's cache."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{flag}: {path} is neither a file nor a folder")
    config = folder / "config.json"
    if config.is_file() and config.stat().st_size > MAX_BYTES:
        raise UserError(f"{flag}: {config} is larger than {MAX_BYTES:,} bytes")


def _checked_sizes(config: Any, where: str) -> Any:
    """Return `config`. Raises `UserError` for an impossible size; `where` is the start
    of the message."""
    text = config.get_text_config()
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        size = getattr(text, name, 1)
        if not isinstance(size, int) or size < 1:
            raise UserError(
                f"{where}: {name} must be a whole number above 0, got {size!r}"
            )
    if getattr(text, "num_hidden_layers", 1) > MAX_LAYERS:
        raise UserError(
            f"{where}: num_hidden_layers must be at most {MAX_LAYERS:,}, got {text.num_hidden_layers:,}"
        )
    return config


MAX_LAYERS = 2048
"""Maximum number of layers: creating each takes milliseconds, even without weights."""


def named_config(
    name: str, trust_remote_code: bool = False, flag: str = MODEL_FLAG
) -> Any:
    """The config of a model folder, a Hub name or a config JSON. Needs no weights.
    Raises `UserError` that names `flag`."""
    path = local(name, flag, CONFIGS)
    if path.is_file() or path.suffix == ".json":
        return read_model_config(path, flag=flag)
    return folder_config(path if path.is_dir() else name, trust_remote_code, flag)


_NON_ARCHITECTURAL_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "problem_type", "id2label", "label2id", "chunk_size_feed_forward",
}  # fmt: skip
"""Settings of a config that do not affect the logits."""


def config_digest(config: Any) -> str:
    """16 hex digits that identify all architectural settings of a config, such as
    rope_theta and the number of heads, which the fingerprint of the weights does not
    cover."""
    values = config.to_dict().items()
    architecture = {
        key: value for key, value in values if key not in _NON_ARCHITECTURAL_KEYS
    }
    text = json.dumps(architecture, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_attention_error(error: Exception) -> bool:
    """Whether transformers rejects the attention implementation."""
    return "attn_implementation" in str(error) or "flash" in reason(error).lower()


def make_model(config: Any, where: str, **options: Any) -> Any:
    """Create a model with random weights. Raises `UserError`; `where` is the start of
    the message."""
    try:
        # A copy, because the model class may change the config
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    except Exception as error:
        # The checks of model classes raise any error
        attention = options.get("attn_implementation")
        if attention is not None and _is_attention_error(error):
            where = f"--attn_implementation {attention}"
        raise UserError(
            f"{where}: no model can be created from this config: {reason(error)}"
        ) from error


def set_rope(
    config: Any, settings: Mapping[str, Any] | None, trust_remote_code: bool
) -> None:
    """Apply the `settings` of --rope_scaling to `config`, in place.

    Raises `UserError` if the model would ignore them.
    """
    if settings is not None:
        with_changes(config, rope_changes(config, settings))
        with torch.device("meta"):
            meta_model = make_model(config, ROPE, trust_remote_code=trust_remote_code)
        check_used(meta_model, settings["rope_type"])


def unsharded_loading() -> AbstractContextManager[None]:
    """A context in which `from_pretrained` loads unsharded weights. Otherwise it shards
    them at stage 3 if `TrainingArguments` with a DeepSpeed config exist
    (transformers/integrations/deepspeed.py, `_hf_deepspeed_config_weak_ref`)."""
    return replaced(hf_deepspeed, "_hf_deepspeed_config_weak_ref", None)


def kept_in_fp32(
    base: BaseCheckpoint, dtype: torch.dtype | None, trust_remote_code: bool
) -> set[str]:
    """Keys of the tensors that a model loaded in `dtype` keeps in fp32, such as routers.
    Empty for a model with remote code that is not trusted."""
    if dtype in (None, torch.float32):
        return set()
    with suppress(UserError), torch.device("meta"), unsharded_loading():
        config = folder_config(base.folder, trust_remote_code)
        meta_model = make_model(
            config, MODEL_FLAG, dtype=dtype, trust_remote_code=trust_remote_code
        )
        # from_pretrained decides by patterns of names (modeling_utils.py,
        # `_get_dtype_plan`), or by the dtype that the class gives a tensor
        # (core_model_loading.py, `convert_and_load_state_dict_in_model`).
        patterns = meta_model._get_dtype_plan(dtype)
        names = [
            name
            for name, tensor in meta_model.state_dict().items()
            if tensor.dtype != dtype
            or any(re.search(pattern, name) for pattern in patterns)
        ]
        return set(map_model(base, meta_model, names).values())
    return set()


def load_model(
    folder: Path,
    dtype: torch.dtype | str,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    flag: str = MODEL_FLAG,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """Load the model of a folder on the CPU, with `changes` of its config
    (`rope_changes`). Raises `UserError` that names `flag` if it cannot be loaded, or if
    weights are missing or do not fit the config."""
    config = with_changes(folder_config(folder, trust_remote_code, flag), changes or {})
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    count = layers
    where = f"{flag} {folder}: cannot be loaded as a causal language model"
    files = list(folder.glob("*.bin"))
    try:
        base = BaseCheckpoint.open(folder, quantized=True)
        count = len(base.keys())
        files = base.files()
    except WeightMappingError:
        # The number of pickled weights is unknown
        pass
    except UserError as error:
        # transformers would follow the names in a damaged index out of the folder
        damage = str(error).removeprefix(f"{MODEL_FLAG}: ")
        raise UserError(f"{where}: {damage}") from error
    # Fail before a huge number of layers is created
    if layers > count:
        raise UserError(
            f"{flag} {folder}: weights are missing: {layers:,} layers, and {count:,} tensors in the files"
        )
    _check_numbers(config, files, f"{flag} {folder}", trust_remote_code)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # Reported below, with their names
            ignore_mismatched_sizes=True,
            # From 5.25 on transformers replaces layers by code that the Hub has today
            # (modeling_utils.py, `set_use_kernels`): a run would not repeat its bits
            use_kernels=False,
        )
    except Exception as error:
        # transformers and safetensors raise any error for an invalid folder
        why = reason(error)
        if _is_attention_error(error):
            raise UserError(
                f"--attn_implementation {attn_implementation}: {why}"
            ) from error
        raise UserError(f"{where}: {why}") from error
    model, info = loaded
    problems = {
        "missing_keys": "weights are missing",
        "mismatched_keys": "weights do not fit the config",
    }
    for what, problem in problems.items():
        if info.get(what):
            some = ", ".join(str(key) for key in list(info[what])[:3])
            raise UserError(
                f"{flag} {folder}: {problem} for {len(info[what])} tensors, e.g. {some}"
            )
    return model


def _check_numbers(
    config: Any, files: Sequence[Path], where: str, trust_remote_code: bool
) -> None:
    """Raise `UserError` where the config asks for far more numbers than the files can
    hold: transformers would allocate them before it compares shapes."""
    numbers = 0
    with suppress(UserError), torch.device("meta"), unsharded_loading():
        meta_model = make_model(config, where, trust_remote_code=trust_remote_code)
        numbers = sum(parameter.numel() for parameter in meta_model.parameters())
    nbytes = sum(path.stat().st_size for path in files)
    # A byte holds two numbers of 4 bits
    if numbers > 4 * nbytes + 2**20:
        raise UserError(
            f"{where}: weights do not fit the config: it asks for {numbers:,} numbers, the files have {nbytes:,} bytes"
        )


def _compare_with_files(
    model: Any, folder: Path, ranks: Ranks
) -> tuple[dict[str, str], str]:
    """(parameter name -> key in the folder's files, first difference between parameters
    and files or ""). Collective: each rank compares a part of the tensors."""

    def compare() -> tuple[dict[str, str], str]:
        try:
            base = BaseCheckpoint.open(folder)
            return _map_and_verify(model, base, ranks.rank, ranks.world), ""
        except WeightMappingError as error:
            return {}, str(error)

    keys, difference = ranks.agree("weights of the model", compare, long=True)
    differences = ranks.gather("comparison of the weights", difference)
    return keys, next(filter(None, differences), "")


def original_tensors(
    model: Any,
    folder: Path,
    own_base: Path,
    dtype: torch.dtype,
    load: Callable[[torch.dtype], Any],
    difference: str,
) -> dict[str, str]:
    """Write the base to `own_base` if necessary. Returns parameter name -> key in it.

    `load` loads the model in another dtype, because `own_base` keeps the precision of
    the files. `difference`: the reason why the files in `folder` cannot be used.
    """
    if own_base.exists() and own_base.samefile(folder):
        raise UserError(
            f"{MODEL_FLAG} {folder}: {difference}; the run would write its base to the same folder: move the model"
        )
    # A resumed run has already written it; if it does not fit, it is written again
    with suppress(UserError):
        return _map_and_verify(model, BaseCheckpoint.open(own_base))
    stored = _stored_dtype(folder)
    if torch.promote_types(stored, dtype) != dtype:
        try:
            return _map_and_verify(model, write_own_base(load(stored), own_base))
        except WeightMappingError as error:
            logger.warning(
                "warning: the weights of %s are %s, but the run's base is saved in %s, so exports with a higher"
                " precision are rounded: %s", folder, dtype_name(stored), dtype_name(dtype), error,
            )  # fmt: skip
    return _map_and_verify(model, write_own_base(model, own_base))


def _stored_dtype(folder: Path) -> torch.dtype:
    """The smallest dtype that represents the files' floating-point weights exactly."""
    try:
        dtypes = BaseCheckpoint.open(folder).dtypes()
    except WeightMappingError:
        dtypes = set()
        for path in folder.glob("pytorch_model*.bin"):
            # The meta device loads only dtypes and shapes
            values = torch.load(path, map_location="meta", weights_only=True).values()
            dtypes |= {value.dtype for value in values if isinstance(value, Tensor)}
    floating = dtypes & set(COMPUTE_DTYPES.values())
    return reduce(torch.promote_types, floating or {torch.float32})


def _map_and_verify(
    model: Any,
    base: BaseCheckpoint,
    rank: int = 0,
    world: int = 1,
) -> dict[str, str]:
    """Parameter name -> key of all tensors. Compares every `world`-th tensor with its
    file."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    keys = map_model(base, model, tensors)
    verify_against_model(base, keys, tensors, list(tensors)[rank::world])
    return keys
