"""Tiny random models of every family, and batches for them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers, move_base
from mora_ds.models.load import load_base

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON},
    "mistral": {**_COMMON, "head_dim": 8, "sliding_window": 12},
    "qwen2": {**_COMMON, "tie_word_embeddings": True},
    "qwen3": {**_COMMON, "head_dim": 16},
    "gemma": {**_COMMON, "head_dim": 16},
    "gemma2": {**_COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12},
    "gemma3_text": {**_COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12},
    "phi3": {**_COMMON},
    "olmo2": {**_COMMON},
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        **_COMMON, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    },
    "gpt_neox": {**_COMMON},
    "gpt2": {
        "vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": FAMILIES["mixtral"],
    "qwen3_moe": FAMILIES["qwen3_moe"],
    "gpt_oss": {
        **_COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        **_COMMON, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": None, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Models with experts in one tensor a projection, each of another class."""

MASKLESS: dict[str, dict[str, Any]] = {
    "opt": {
        "vocab_size": 128, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    },
    "bloom": {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip
"""Small configs of models that take no mask from the positions: documents in one row see each other."""

NO_SDPA = ("gemma2", "gpt_oss")
"""transformers refuses sdpa for capped scores and for sinks."""


def tiny_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A randomly initialised causal LM; the same on every call with the same arguments."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**{**FAMILIES, **MIXTURES}[family], **changes})
    attention = "eager" if family in NO_SDPA else "sdpa"
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(llama: Path, folder: Path) -> Path:
    """The Llama in a folder, which may be the same, as a model whose code comes with it."""
    if folder != llama:
        shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config.update(model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=auto_map)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling_own.py").write_text(OWN_CODE, encoding="utf-8")
    return folder


def model_with_mora(family: str = "llama", **adapter: Any) -> Any:
    """A tiny model with new MoRA matrices. `adapter`: settings of `MoRAConfig`, of rank 4 unless they say otherwise."""
    model = tiny_model(family)
    inject(model, MoRAConfig(**{"rank": 4, **adapter}))
    return model


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass, as a run with --gradient_checkpointing does."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def adapted_model(
    family: str = "llama", checkpointing: bool = False, model: dict[str, Any] | None = None, **adapter: Any
) -> Any:
    """A tiny model with MoRA matrices (rank 4, operator share) that are not zero, so that every path has a gradient.

    `model`: changes of its config; `adapter`: of `MoRAConfig`.
    """
    adapted = tiny_model(family, **(model or {}))
    if checkpointing:
        enable_checkpointing(adapted)
    inject(adapted, MoRAConfig(**{"rank": 4, "operator": "share", **adapter}))
    for index, layer in enumerate(mora_layers(adapted).values()):
        layer.square.data = 0.02 * torch.randn(layer.square.shape, generator=torch.Generator().manual_seed(index))
    return adapted


def tokens(rows: int, length: int = 16, seed: int = 0, vocab: int = 128) -> torch.Tensor:
    """(rows, length) random token ids."""
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def causal_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss; works on models and engines."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def alone() -> Any:
    """What `load_base` asks of the ranks of a run, in one process without a group."""
    return SimpleNamespace(
        agree=lambda what, work, long=False: work(), on_first=lambda what, work, long=False: work(),
        gather=lambda what, value: [value], rank=0, world=1,
    )  # fmt: skip


def loaded_model(folder: Path, dtype: torch.dtype, cast: bool) -> Any:
    """The model of `load_base`."""
    return load_base(folder, folder / "own", alone(), dtype, None, cast=cast).model


def on_device(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors as a run has them on its device, what `initialize` does of it."""
    inject(model, MoRAConfig(rank=4))
    move_base(model, "cpu", dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to("cpu", dtype)
    return {**dict(model.named_buffers()), **dict(model.named_parameters()), **frozen_buffers(model)}
