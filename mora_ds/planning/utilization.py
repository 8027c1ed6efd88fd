"""What fraction of a GPU's arithmetic a run uses (MFU): FLOPs a token, and peaks of cards.

Counted is what the model's definition asks for, forward and backward, without what is
computed again or gathered:

    a frozen weight that multiplies a token     2 FLOPs for each of its numbers in forward, 2 for the input's gradient
    a trained weight, a MoRA matrix             2 more, for its own gradient
    causal attention over complete rows         2 products with half of the row's tokens in forward, 4 in backward
"""

import math
from typing import Any

from torch import nn

from mora_ds.adapters.experts import find_stacks
from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import AdaptedLinear, ExpertStack, is_linear, linear_shape

PEAK_TFLOPS = {
    "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
}  # fmt: skip
"""Dense products a second in bf16 and fp16, in 10^12, by words of the name that CUDA
tells; the first that fits. From NVIDIA's data sheets, whose figures with sparsity are
halved."""


def peak_flops(card: str) -> float | None:
    """The dense operations a second of a card in bf16 or fp16, where the table has
    it."""
    words = f" {card.replace('-', ' ')} "
    for name, peak in PEAK_TFLOPS.items():
        if f" {name} " in words:
            return 1e12 * peak
    return None


def token_flops(model: Any, length: int) -> float:
    """Model FLOPs of a token in rows of `length` tokens, of a model with its adapter or
    one that is trained in full; before the engine shards anything."""
    frozen = 0
    trained = 0
    stacks = find_stacks(model).values()
    layers: list[Any] = [stack for stack in stacks if isinstance(stack, ExpertStack)]
    layers += mora_layers(model).values()
    for module in model.modules():
        if is_linear(module) and not isinstance(module, AdaptedLinear):
            layers.append(module)
    for layer in layers:
        experts = getattr(layer, "experts_per_token", 1) or 1
        weight = math.prod(linear_shape(layer)) * experts
        if isinstance(layer, AdaptedLinear):
            frozen += weight
            trained += layer.spec.multiplications * experts
        elif isinstance(layer.weight, nn.Parameter):
            trained += weight
        else:
            frozen += weight
    attention = _attention(model.config.get_text_config(), length)
    return 4.0 * frozen + 6.0 * (trained + attention)


def _attention(config: Any, length: int) -> int:
    """Multiplications for a token's scores and weighted values in forward, in all
    layers; 0 for a model without heads, and for one whose config does not say them for
    all layers alike."""
    try:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        layers = config.num_hidden_layers
    # RuntimeError is transformers' own, for layers that differ (Gemma 4).
    except (AttributeError, TypeError, RuntimeError):
        return 0
    return layers * heads * size * length if isinstance(heads, int) else 0
