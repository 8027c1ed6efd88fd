"""The evaluation of a training run, outside of one: perplexity over packed sequences of a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.data import IGNORED, PackedDataset, build_cache, load_corpus, load_tokenizer
from mora_ds.models.attention import model_inputs


def packed(tokenizer: Path | str, cache: Path | str, seq_len: int, path: str, **how: Any) -> PackedDataset:
    """A file of text, cut into sequences. `tokenizer`: its folder. `how`: of `PackedDataset`."""
    built = build_cache(load_corpus([path]), load_tokenizer(tokenizer), Path(cache))
    return PackedDataset(built, seq_len, **how)


def token_losses(model: Any, batch: dict[str, Tensor], bias: Tensor | float = 0.0) -> Tensor:
    """The loss of each token of a batch that is predicted. `bias` (vocabulary) is added to the logits; the model itself
    has no gradient."""
    with torch.no_grad():
        logits = model(**model_inputs(model, batch)).logits.float()
    labels = batch["labels"].flatten()
    losses = F.cross_entropy(logits.flatten(0, 1) + bias, labels, ignore_index=IGNORED, reduction="none")
    return losses[labels != IGNORED]


@torch.no_grad()
def perplexity(model: Any, data: PackedDataset, batch_size: int, bias: Tensor | float = 0.0) -> float:
    """Of all sequences, as a training run evaluates them."""
    losses = [token_losses(model, batch, bias) for batch in data.eval_batches(0, 1, batch_size)]
    return math.exp(torch.cat(losses).double().mean().item())
