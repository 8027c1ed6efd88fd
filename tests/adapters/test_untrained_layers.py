"""Layers that a text never trains: those whose weights a model reads without calling
them, and the towers of multimodal models."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.target_modules import (
    READ_DIRECTLY,
    language_model,
    match_targets,
)
from tests.helpers.errors import user_error
from tests.helpers.models import FAMILIES, causal_loss, tokens
from tests.helpers.tables import parsed

COMMON = FAMILIES["llama"]
MODELS = parsed("""
llama: {}
mamba: {state_size: 4}
jamba: {num_experts: 2, attn_layer_period: 2, attn_layer_offset: 1}
gemma3n_text:
  {head_dim: 16, vocab_size_per_layer_input: 128, hidden_size_per_layer_input: 8, num_kv_shared_layers: 0,
   laurel_rank: 4, activation_sparsity_pattern: [0.0, 0.0], intermediate_size: [56, 56],
   layer_types: [sliding_attention, full_attention]}
""")
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
MULTIMODAL = parsed("""
gemma3: {}
gemma4:
  {global_head_dim: 16, vocab_size_per_layer_input: 128, hidden_size_per_layer_input: 8, num_kv_shared_layers: 0,
   layer_types: [sliding_attention, full_attention]}
""")


def model_of(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **MODELS[kind]})
    model = AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # Gemma 3n's scales are zeros, which let no gradient through
            parameter.data += 0.1
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_of_all_linear_gets_a_gradient(kind):
    model = model_of(kind)
    inject(model, MoRAConfig(rank=4))
    causal_loss(model, tokens(2)).backward()
    layers = mora_layers(model)
    gradients = {name: layer.adapter_weight.grad for name, layer in layers.items()}
    assert [name for name in layers if gradients[name] is None] == []
    assert [name for name in layers if not gradients[name].any()] == []


@pytest.mark.parametrize(
    "kind, pattern",
    [
        ("mamba", "x_proj"),
        ("mamba", "out_proj"),
        ("jamba", "re:.*(in|dt)_proj"),
        ("gemma3n_text", "*_coefs"),
    ],
)
def test_a_layer_whose_weight_is_read_is_refused_by_name(kind, pattern):
    with user_error(r"`target_modules` includes '\S+', whose weight the model reads"):
        inject(model_of(kind), MoRAConfig(target_modules=(pattern,)))


def test_a_projection_that_the_mixer_calls_is_adapted():
    names = match_targets(model_of("jamba"), ("x_proj", "out_proj"))
    assert len(names) == 2


def test_the_table_is_what_transformers_reads():
    """The test reads the sources, because the fused kernels run on GPUs only: it fails
    after an upgrade that adds such a module. FalconMamba's are those of transformers
    5.24; later versions call them."""
    found = set()
    models = Path(transformers.__file__).parent / "models"
    for path in models.glob("*/modeling_*.py"):
        for text in re.split(r"^class ", path.read_text(), flags=re.MULTILINE)[1:]:
            kind = text[: re.search(r"\W", text).start()]
            if "self.A_log" in text or "altup" in text:
                read = re.findall(r"self\.(\w+_(?:proj|coefs))\.weight\b", text)
                found |= {f"{kind}.{name}" for name in read}
    called_since_5_25 = {"FalconMambaMixer.x_proj", "FalconMambaMixer.out_proj"}
    assert found | called_since_5_25 == READ_DIRECTLY


# -- multimodal models -----------------------------------------------------------------


def multimodal(kind):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    untied = {"tie_word_embeddings": False}
    config = AutoConfig.for_model(
        kind,
        text_config={**COMMON, **untied, "head_dim": 16, **MULTIMODAL[kind]},
        vision_config={**TOWER, **heads, "image_size": 28, "patch_size": 14},
        **untied,
    )
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_of_a_multimodal_model_the_language_model_and_the_head_are_trained(kind):
    model = multimodal(kind)
    linear = match_targets(model, ("re:.*",)).keys() - {"lm_head"}
    also = {"train_embeddings": True, "train_norms": True, "train_head": True}
    inject(model, MoRAConfig(rank=4, **also))
    assert mora_layers(model).keys() == linear
    causal_loss(model, tokens(2)).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert [name for name in gradients if gradients[name] is None] == []
    parts = {
        re.sub(r"language_model\..*", "language_model", name) for name in gradients
    }
    assert parts == {"model.language_model", "lm_head.weight"}


def test_a_layer_of_a_tower_is_no_target():
    with user_error("matches no linear layer"):
        match_targets(multimodal("gemma3"), ("*.vision_tower.*",))


def test_the_language_model_holds_the_decoder_layers():
    model = multimodal("gemma3")
    assert language_model(model) is model.model.language_model
    model.config.text_config.num_hidden_layers = 3  # other than in the decoder
    assert language_model(model) is model
