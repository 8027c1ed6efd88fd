"""Every type of causal language model of the installed transformers that can be made small
by the usual names of sizes: an upgrade that brings a layer which adapters, merges or
loading would get wrong fails here."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.mora import delta_weight
from tests.helpers.models import tokens
from tests.helpers.tables import parsed

SMALL = parsed("""
{vocab_size: 128, max_position_embeddings: 128, n_positions: 128, max_seq_len: 128,
 hidden_size: 32, n_embd: 32, d_model: 32, word_embed_proj_dim: 32, head_dim: 8, state_size: 8,
 intermediate_size: 56, ffn_dim: 56, ffn_hidden_size: 56, n_inner: 56, moe_intermediate_size: 24,
 num_hidden_layers: 2, n_layer: 2, n_layers: 2, num_attention_heads: 4, n_head: 4, n_heads: 4,
 num_heads: 4, num_key_value_heads: 2, num_experts: 4, num_local_experts: 4, n_routed_experts: 4,
 num_experts_per_tok: 2, layer_types: null, pad_token_id: 0, bos_token_id: 1, eos_token_id: 2}
""")
"""Names that configs have for their sizes."""

LARGEST = 4_000_000
LEAST_TYPES = 115
"""Parameters of a model that is still tried; types that must be left."""


def small_models():
    """Type -> a model that computes and trains by itself."""
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            known = AutoConfig.for_model(kind).to_dict()
            config = AutoConfig.for_model(
                kind, **{name: size for name, size in SMALL.items() if name in known}
            )
            with torch.device("meta"):
                planned = AutoModelForCausalLM.from_config(config)
            if sum(parameter.numel() for parameter in planned.parameters()) > LARGEST:
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            model(input_ids=tokens(2)).logits.float().logsumexp(-1).sum().backward()
        # Sizes that do not fit together, packages that are not installed: nothing of ours
        # has run
        except Exception:
            continue
        model.zero_grad()
        yield kind, model


def check_merged(model):
    """Adapted layers whose matrices get a gradient compute what the model with the updates
    in its weights computes.
    """
    adapted = copy.deepcopy(model)
    inject(adapted, MoRAConfig(rank=4))
    adapted(input_ids=tokens(2)).logits.float().logsumexp(-1).sum().backward()
    layers = {
        name: layer
        for name, layer in mora_layers(adapted).items()
        if layer.adapter_weight.grad is not None
    }
    assert layers, "no matrix gets a gradient"
    with torch.no_grad():
        for name, layer in layers.items():
            if layer.adapter_weight.grad.any():
                layer.adapter_weight.data = 0.05 * torch.randn(
                    layer.adapter_weight.shape
                )
            module = model.get_submodule(name)
            delta = delta_weight(layer.spec, layer.adapter_weight.data)
            module.weight.data += delta.T if isinstance(module, Conv1D) else delta
        live, merged = (
            network(input_ids=tokens(2)).logits for network in (adapted, model)
        )
    apart = ((live - merged).norm() / merged.norm()).item()
    assert apart < 1e-4, f"merged is {apart:.1e} from live"


@pytest.mark.heavy
def test_every_type_is_adapted_and_merged():
    wrong = {}
    tried = 0
    for kind, model in small_models():
        tried += 1
        try:
            check_merged(model)
        except Exception as error:  # all of them, with their names
            wrong[kind] = f"{type(error).__name__}: {error}"[:300]
    assert not wrong, wrong
    assert tried >= LEAST_TYPES, tried
