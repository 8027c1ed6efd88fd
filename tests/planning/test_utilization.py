"""Model FLOPs, counted from shapes, against what torch counts; the peaks of cards."""

import pytest
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mora_ds.adapters.inject import mora_layers
from mora_ds.planning.utilization import peak_flops, token_flops
from tests.helpers.models import causal_loss, model_with_mora, tiny_model, tokens
from tests.helpers.tables import each_row

LENGTH = 32


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_flops_of_full_training_equal_the_count_of_torch(family):
    model = tiny_model(family)
    # Torch counts no attention of a CPU's own kernel
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        causal_loss(model, tokens(1, LENGTH)).backward()
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    all_scores = 12 * config.num_hidden_layers * heads * size * LENGTH
    # torch counts attention without its mask: twice what a causal kernel computes
    assert (
        token_flops(model, LENGTH)
        == counter.get_total_flops() / LENGTH - all_scores / 2
    )


@pytest.mark.parametrize("operator", ["share", "rotate"])
def test_a_frozen_weight_takes_two_thirds_and_a_matrix_its_blocks(operator):
    full = token_flops(tiny_model("llama"), LENGTH)
    head = 128 * 32
    model = model_with_mora(operator=operator)
    layers = mora_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    matrices = sum(layer.adapter_weight.numel() * layer.spec.blocks for layer in layers)
    assert token_flops(model, LENGTH) == full - 2 * (weights + head) + 6 * matrices


WEIGHTS_OF_TWO_EXPERTS = 2 * 2 * (32 * 48 + 24 * 32)
"""Two projections, of 32 to 48 and 24 to 32 numbers, in each of two layers."""


def test_a_token_takes_the_experts_that_it_has():
    """Two of eight, then four."""
    model = model_with_mora("qwen3_moe", target_modules=("all-linear", "experts"))
    stacks = [
        layer
        for layer in mora_layers(model).values()
        if layer.spec.adapter_weight_shape[2:]
    ]
    with_experts = token_flops(model, LENGTH)
    matrices = sum(
        2 * layer.adapter_weight[0].numel() * layer.spec.operator.blocks
        for layer in stacks
    )
    for layer in stacks:
        layer.experts_per_token = 4
    more = token_flops(model, LENGTH) - with_experts
    assert more == 4 * WEIGHTS_OF_TWO_EXPERTS + 6 * matrices


def test_a_config_of_any_type_is_counted():
    """Some say no heads, or other ones in each layer, which transformers refuses to
    give.
    """
    attention = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = nn.Module()
        try:
            model.config = AutoConfig.for_model(kind).get_text_config()
        except Exception:  # no config of its own, or of one text model
            continue
        attention[kind] = token_flops(model, LENGTH)
    assert attention["llama"] == 6 * 32 * 4096 * LENGTH
    assert attention["mamba"] == 0
    assert len(attention) > 150


def test_experts_that_no_adapter_has_are_frozen():
    model = model_with_mora("qwen3_moe")
    without_experts = token_flops(model, LENGTH)
    model.config.num_experts_per_tok = 4  # of 2 before
    assert token_flops(model, LENGTH) - without_experts == 4 * WEIGHTS_OF_TWO_EXPERTS


CARDS = """
NVIDIA H100 80GB HBM3 | 989e+12
NVIDIA H100 PCIe | 756e+12
NVIDIA A100-SXM4-80GB | 312e+12
NVIDIA GH200 480GB | 989e+12
NVIDIA L40S | 362e+12
"""


@each_row("card, peak", CARDS)
def test_cards_have_the_peaks_of_their_data_sheets(card, peak):
    assert peak_flops(card) == float(peak)


@pytest.mark.parametrize("card", ["NVIDIA L40", ""])
def test_a_card_that_the_table_lacks_has_no_peak(card):
    assert peak_flops(card) is None
