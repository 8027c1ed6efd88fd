"""Models with a MoRA adapter of PEFT."""

import torch

from mora_ds.peft.model import MoraLinear
from tests.helpers.models import tokens
from tests.helpers.operators import random

IDS = tokens(3)


def layers(model):
    """Name in the base model -> layer."""
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    return {
        name: module
        for name, module in inner.named_modules()
        if isinstance(module, MoraLinear)
    }


def fill(model, adapter="default", seed=1):
    """Matrices that are not zero, in every layer that has the adapter."""
    for index, layer in enumerate(layers(model).values()):
        if adapter in layer.mora_matrix:
            mora_matrix = layer.mora_matrix[adapter]
            mora_matrix.data = 0.05 * random(
                *mora_matrix.shape, seed=100 * seed + index
            ).to(mora_matrix)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits
