"""Tiny random models of every family, and batches for them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers

_CONFIGS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
FAMILIES = _CONFIGS["families"]
MIXTURES = _CONFIGS["mixtures"]
"""Models with experts in one tensor a projection, each of another class."""

MASKLESS = _CONFIGS["maskless"]
"""Small configs of models that take no mask from the positions: documents in one row see
each other.
"""

NO_SDPA = ("gemma2", "gpt_oss")
"""transformers refuses sdpa for capped scores and for sinks."""


def tiny_model(family="llama", seed=0, dtype=torch.float32, **changes):
    """A randomly initialized causal LM; the same on every call with the same arguments."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, **{**{**FAMILIES, **MIXTURES}[family], **changes}
    )
    attention = "eager" if family in NO_SDPA else "sdpa"
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention
    )


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def with_own_code(llama, folder):
    """The Llama in a folder, which may be the same, as a model whose code comes with it."""
    if folder != llama:
        shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config.update(
        model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=auto_map
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(OWN_CODE)
    return folder


def model_with_mora(family="llama", **adapter):
    """A tiny model with new MoRA matrices. `adapter`: settings of `MoRAConfig`, of rank 4
    unless they say otherwise.
    """
    model = tiny_model(family)
    inject(model, MoRAConfig(**{"rank": 4, **adapter}))
    return model


def enable_checkpointing(model):
    """Recompute activations in the backward pass, as a run with --gradient_checkpointing
    does.
    """
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )


def adapted_model(family="llama", checkpointing=False, model=None, **adapter):
    """A tiny model with MoRA matrices (rank 4, operator share) that are not zero, so that
    every path has a gradient.

    `model`: changes of its config; `adapter`: of `MoRAConfig`.
    """
    adapted = tiny_model(family, **(model or {}))
    if checkpointing:
        enable_checkpointing(adapted)
    inject(adapted, MoRAConfig(**{"rank": 4, "operator": "share", **adapter}))
    for index, layer in enumerate(mora_layers(adapted).values()):
        generator = torch.Generator().manual_seed(index)
        drawn = torch.randn(layer.mora_matrix.shape, generator=generator)
        layer.mora_matrix.data = (0.02 * drawn).to(layer.mora_matrix.dtype)
    return adapted


def tokens(rows, length=16, seed=0, vocab=128):
    """(rows, length) random token ids."""
    return torch.randint(
        3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def causal_loss(model, ids):
    """Mean next-token loss; works on models and engines."""
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    )


def micro_step(engine, ids):
    """Forward, backward and step of an engine; the loss, without its graph."""
    loss = causal_loss(engine, ids)
    engine.backward(loss)
    engine.step()
    return loss.detach()


def alone():
    """The ranks that `load_base` needs, in one process without a group."""
    return SimpleNamespace(
        agree=lambda what, work, long=False: work(),
        run_on_rank0=lambda what, work, long=False: work(),
        gather=lambda what, value: [value],
        rank=0,
        world=1,
    )
