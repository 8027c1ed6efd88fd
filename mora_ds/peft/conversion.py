"""A MoRA adapter as LoRA, and how much of it is lost."""

from typing import Any

import torch
from peft import LoraConfig
from peft import convert_to_lora as peft_convert_to_lora
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mora_ds.peft.model import MoraLinear


def convert_to_lora(
    model: Any, rank: int | float, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor], float]:
    """PEFT's `convert_to_lora`, by a singular value decomposition of each delta, and the
    largest relative error of a layer, in the Frobenius norm.

    `rank`: of every layer; a fraction is the share of the squared singular values to
    keep, with a rank for each layer. Deltas of `share` and `truncate` have at most rank
    r_hat, so that with 1.0 nothing but rounding is lost. Returns the config and the
    weights, for `get_peft_model` and `set_peft_model_state_dict`.
    """
    config, state = peft_convert_to_lora(model, rank, adapter_name)
    errors = [0.0]
    for name, layer in model.named_modules():
        if isinstance(layer, MoraLinear):
            product = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
            delta = layer.get_delta_weight(adapter_name)
            if isinstance(layer.get_base_layer(), Conv1D):
                delta = delta.T
            norm = torch.linalg.vector_norm(delta)
            lost = torch.linalg.vector_norm(delta - product)
            errors.append((lost / norm.clamp(min=1e-30)).item())
    return config, state, max(errors)
