"""Loads the base: a Hugging Face folder or Hub name -> live model, original tensors on
disk, names of both.

Every rank reads the same files unsharded. Exact merging reads the original tensors
again, so a base whose files do not hold the live tensors one to one (pickled weights,
tensors fused at load, a model made from a config) is written once, with the live names,
to a folder of the run.
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import deepspeed as hf_deepspeed

from mora_ds.common.errors import UserError, reason
from mora_ds.common.files import config_names
from mora_ds.common.rope import FLAG as ROPE
from mora_ds.common.tensor_files import COMPUTE_DTYPES, dtype_name
from mora_ds.common.untrusted import expanded, parse_json
from mora_ds.models.base import (
    MODEL_FLAG,
    BaseCheckpoint,
    NotOneToOne,
    map_model,
    verify_against_model,
    write_own_base,
)
from mora_ds.models.rope import changed, check_used, rope_changes
from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass
class LoadedBase:
    """A live model and its original tensors on disk."""

    model: Any
    base: BaseCheckpoint
    keys: dict[str, str]
    """Parameter name -> key in `base`."""


def resolve_folder(name: str, ranks: Ranks) -> Path:
    """The folder `name`, or that of a downloaded Hub repository. Collective.

    Raises `UserError` where there is none, and where only some ranks see the folder.
    """
    folder = ranks.agree("folder of the model", lambda: local_folder(name))
    kind = "no folder, so a name on the Hub" if folder is None else "a folder"
    ranks.same("the model", {f"{MODEL_FLAG} is": kind})
    if folder is not None:
        return folder
    ranks.agree(
        "download of the model",
        lambda: download_model(name) if ranks.is_local_first else None,
        long=True,
    )
    return ranks.agree("downloaded model", lambda: download_model(name))


def local_folder(name: str) -> Path | None:
    """The folder `name`; None for a name that can only be one of the Hub's."""
    folder = expanded(name, MODEL_FLAG)
    is_model = (folder / "config.json").is_file()
    is_gguf = folder.suffix == ".gguf" and folder.exists()
    if not is_model and (is_gguf or any(folder.glob("*.gguf"))):
        raise UserError(
            f"{MODEL_FLAG} {name}: GGUF is not read: give the unquantized model that it was made of"
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

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.py", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            # An older model, such as facebook/opt-125m, has pickled weights alone
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
    """The live model in `dtype` on the CPU, and its parameters' originals. Collective.

    `changes`: of the folder's config (`rope_changes`), which the live model has. Rank 0
    writes the base to `own_base`, in the precision of its files, if these are not one
    to one. Raises `UserError` where weights are missing or do not fit the config.
    """
    load = partial(
        load_model,
        folder,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        changes=changes,
    )
    model = ranks.agree("loading of the model", lambda: load(dtype), long=True)
    keys, difference = _one_to_one(model, folder, ranks)
    originals_at = folder
    if difference:
        write = partial(
            original_tensors, model, folder, own_base, dtype, load, difference
        )
        keys = ranks.on_first("originals of the model", write, long=True)
        originals_at = own_base
    base = ranks.agree("files of the model", lambda: BaseCheckpoint.open(originals_at))
    return LoadedBase(model, base, keys)


def create_base(
    config_file: Path,
    folder: Path,
    seed: int,
    tokenizer: Any,
    vocab_size: int,
) -> Path:
    """Writes a base with random weights from a config JSON, in fp32, on one rank."""
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
    """The config in a JSON such as `configs/models/tiny_llama.json`. Raises `UserError`
    naming `flag`."""
    try:
        values = parse_json(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        packaged = ", ".join(f"configs/{name}" for name in config_names("models"))
        raise UserError(
            f"{flag} {config_file}: no such file; mora_ds comes with {packaged}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {config_file}: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{flag} {config_file}: no model_type in it")
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:
        # Classes of configs have checks of their own, which raise errors of many kinds
        raise UserError(f"{flag} {config_file}: {reason(error)}") from error
    return _with_sizes(config, f"{flag} {config_file}")


def folder_config(
    folder: Path | str,
    trust_remote_code: bool = False,
    flag: str = MODEL_FLAG,
) -> Any:
    """The config of a model folder. Raises `UserError` naming `flag`."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Classes of configs have checks of their own, which raise errors of many kinds
        if "trust_remote_code" in str(error):
            # The library's advice is for callers in Python
            why = "its own code must be run: allow that with --trust_remote_code"
        elif isinstance(error.__cause__, HFValidationError):
            # Transformers has found no such folder, and taken it for a name on the Hub
            why = "no such folder, and no name that a model of the Hub can have"
        else:
            why = f"its config.json cannot be used: {reason(error)}"
        raise UserError(f"{flag} {folder}: {why}") from error
    return _with_sizes(config, f"{flag} {folder}: its config.json cannot be used")


def _with_sizes(config: Any, where: str) -> Any:
    """`config`, or `UserError`, after `where`, for a size that no model has."""
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
"""Most layers of a model: each takes milliseconds to make, even without weights."""


def named_config(
    name: str, trust_remote_code: bool = False, flag: str = MODEL_FLAG
) -> Any:
    """The config of a model folder, a Hub name or a config JSON, without any weights.
    Raises `UserError` naming `flag`."""
    path = expanded(name, flag)
    if path.is_file() or path.suffix == ".json":
        return read_model_config(path, flag=flag)
    return folder_config(path if path.is_dir() else name, trust_remote_code, flag)


_NOT_THE_FUNCTION = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "problem_type", "id2label", "label2id", "chunk_size_feed_forward",
}  # fmt: skip
"""Settings of a config that do not change the model's function."""


def config_digest(config: Any) -> str:
    """16 hex digits that identify the model's function as its config describes it, such
    as rope_theta and the number of heads, which the fingerprint of the weights does not
    contain."""
    values = config.to_dict()
    for name in _NOT_THE_FUNCTION & values.keys():
        del values[name]
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_of_attention(error: Exception) -> bool:
    """Whether transformers has refused the implementation of attention."""
    return "attn_implementation" in str(error) or "flash" in reason(error).lower()


def make_model(config: Any, where: str, **options: Any) -> Any:
    """A model with random weights. Raises `UserError`, after the words `where`."""
    try:
        # A copy, as the class of the model may change it
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
    except Exception as error:
        # Classes of models have checks of their own, which raise errors of many kinds
        attention = options.get("attn_implementation")
        if attention is not None and _is_of_attention(error):
            where = f"--attn_implementation {attention}"
        raise UserError(
            f"{where}: no model can be made of this config: {reason(error)}"
        ) from error


def set_rope(
    config: Any, settings: Mapping[str, Any] | None, trust_remote_code: bool
) -> None:
    """Change `config` as the `settings` of --rope_scaling say.

    Raises `UserError` where a model of it does not compute with them.
    """
    if settings is not None:
        changed(config, rope_changes(config, settings))
        with torch.device("meta"):
            sketch = make_model(config, ROPE, trust_remote_code=trust_remote_code)
        check_used(sketch, settings["rope_type"])


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """Within the context `from_pretrained` does not shard what it loads, as it does at
    stage 3 once `TrainingArguments` with a DeepSpeed config exist
    (transformers/integrations/deepspeed.py, `_hf_deepspeed_config_weak_ref`)."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def kept_in_fp32(
    base: BaseCheckpoint, dtype: torch.dtype | None, trust_remote_code: bool
) -> set[str]:
    """Keys of the tensors that a model of the base has in fp32 though it is loaded in
    `dtype`, such as routers. None of a model whose own code must not run."""
    if dtype in (None, torch.float32):
        return set()
    with suppress(UserError), torch.device("meta"), unsharded_loading():
        config = folder_config(base.folder, trust_remote_code)
        sketch = make_model(
            config, MODEL_FLAG, dtype=dtype, trust_remote_code=trust_remote_code
        )
        # As from_pretrained chooses: by patterns of names (modeling_utils.py,
        # `_get_dtype_plan`), or as the class makes a tensor (core_model_loading.py,
        # `convert_and_load_state_dict_in_model`).
        patterns = sketch._get_dtype_plan(dtype)
        names = [
            name
            for name, tensor in sketch.state_dict().items()
            if tensor.dtype != dtype
            or any(re.search(pattern, name) for pattern in patterns)
        ]
        return set(map_model(base, sketch, names).values())
    return set()


def load_model(
    folder: Path,
    dtype: torch.dtype | str,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    flag: str = MODEL_FLAG,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """The model of a folder on the CPU, with `changes` of its config (`rope_changes`).
    Raises `UserError` naming `flag` where it cannot be loaded, and where weights are
    missing or do not fit the config."""
    config = changed(folder_config(folder, trust_remote_code, flag), changes or {})
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    count = layers
    damage = ""
    try:
        count = len(BaseCheckpoint.open(folder).keys())
    except NotOneToOne:
        # How many pickled weights there are is not known
        pass
    except UserError as error:
        # Told below, where transformers may not name the file
        damage = str(error).removeprefix(f"{MODEL_FLAG}: ")
    # Refused before so many layers are made
    if layers > count:
        raise UserError(
            f"{flag} {folder}: weights are missing: {layers:,} layers, and {count:,} tensors in the files"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # These are refused below, with their names
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        # Of an unusable folder transformers and safetensors raise errors of many kinds
        why = reason(error)
        if _is_of_attention(error):
            raise UserError(
                f"--attn_implementation {attn_implementation}: {why}"
            ) from error
        raise UserError(
            f"{flag} {folder}: cannot be loaded as a causal language model: {damage or why}"
        ) from error
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


def _one_to_one(model: Any, folder: Path, ranks: Ranks) -> tuple[dict[str, str], str]:
    """(parameter name -> key in the folder's files, what is not one to one there; ""
    where the files hold the live tensors). Collective: each rank compares a slice."""

    def compare() -> tuple[dict[str, str], str]:
        try:
            base = BaseCheckpoint.open(folder)
            return _map_and_verify(model, base, ranks.rank, ranks.world), ""
        except NotOneToOne as error:
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
    """The keys of the originals in `own_base`, which is written if needed.

    `load` loads the model again in another dtype: `own_base` keeps the precision of the
    files, not that of the run. `difference`: why the files in `folder` do not do.
    """
    if own_base.exists() and own_base.samefile(folder):
        raise UserError(
            f"{MODEL_FLAG} {folder}: {difference}; the run would write its base over it: move it"
        )
    # A run that is resumed has written it before; one that does not fit is written anew
    with suppress(UserError):
        return _map_and_verify(model, BaseCheckpoint.open(own_base))
    stored = _stored_dtype(folder)
    if torch.promote_types(stored, dtype) != dtype:
        try:
            return _map_and_verify(model, write_own_base(load(stored), own_base))
        except NotOneToOne as error:
            logger.warning(
                "warning: the weights of %s are %s and are kept in %s only, in which exports in more precision are"
                " rounded: %s", folder, dtype_name(stored), dtype_name(dtype), error,
            )  # fmt: skip
    return _map_and_verify(model, write_own_base(model, own_base))


def _stored_dtype(folder: Path) -> torch.dtype:
    """The smallest dtype that holds the files' floating-point weights unrounded."""
    try:
        dtypes = BaseCheckpoint.open(folder).dtypes()
    except NotOneToOne:
        dtypes = set()
        for path in folder.glob("pytorch_model*.bin"):
            # The meta device loads dtypes and shapes, without the numbers
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
    """Parameter name -> key of all tensors; of which every `world`-th is compared."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    keys = map_model(base, model, tensors)
    verify_against_model(base, keys, tensors, list(tensors)[rank::world])
    return keys
