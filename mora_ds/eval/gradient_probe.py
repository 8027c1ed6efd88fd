"""Norms of each layer's gradients on some text, before any training: how strongly the text would change the layer.

    model -> MoRA matrices M = 0 injected -> forward and backward of each batch, as in a run
             |dL/dM|   gradient of M, for the chosen operator and rank
             |dL/dW|   gradient of the frozen weight: g^T x of a layer's inputs x and output gradients g, layer by layer

Both are roots of the mean, over batches, of the squared Frobenius norm of a batch's gradient (its loss being the mean
over tokens). At M = 0, dL/dM is the operator's adjoint of dL/dW: the part of it that M can follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.common.errors import RunError, UserError
from mora_ds.data import Document

FLAG = "--probe"


@dataclass(frozen=True)
class GradientMeasures:
    """Norms of the gradients of one layer."""

    module: str
    d_in: int
    d_out: int
    r_hat: int
    """Side of the MoRA matrix that was probed."""
    square_norm: float
    """|dL/dM| at M = 0."""
    weight_norm: float
    """|dL/dW|."""

    @property
    def score(self) -> float:
        """Root mean square of the entries of dL/dM: the decrease of the loss, to first order, for each parameter that
        Adam changes by one unit."""
        return self.square_norm / self.r_hat

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}


def probe(model: Any, config: MoRAConfig, batches: Sequence[Tensor]) -> list[GradientMeasures]:
    """The measures of every layer that `config` adapts, in the model's order. `batches`: (rows, T) token ids each.

    `model`: of transformers, without adapters; afterwards it has MoRA matrices of zeros. Peak memory in addition to
    the model: what a training step saves, every layer's input, and one gradient of the size of a weight. Raises
    `RunError` for a gradient that is not finite.
    """
    inject(model, config)
    model.eval()  # no dropout: the same on every call
    layers = mora_layers(model)
    of_matrices, of_weights = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def forward(layer: AdaptedLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def backward(g: Tensor) -> None:
                of_weights[name] += _energy(g.flatten(0, -2).T @ x)

            output.register_hook(backward)

        return forward

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for ids in batches:
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            targets = ids.to(logits.device)[:, 1:].flatten()
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets).backward()
            for name, layer in layers.items():
                of_matrices[name] += _energy(layer.value.grad)
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    measures = []
    for name, layer in layers.items():
        energies = of_matrices[name], of_weights[name]
        if not all(map(math.isfinite, energies)):
            raise RunError(f"{name}: its gradient is not finite")
        norms = (math.sqrt(energy / len(batches)) for energy in energies)
        measures.append(GradientMeasures(name, layer.in_features, layer.out_features, layer.value.shape[0], *norms))
    return measures


def _energy(gradient: Tensor | None) -> float:
    """Squared Frobenius norm; 0 for a layer that no token has reached, such as an expert's."""
    return 0.0 if gradient is None else torch.linalg.vector_norm(gradient, dtype=torch.float64).item() ** 2


def token_batches(documents: Iterable[Document], tokenizer: Any, seq_len: int, count: int, rows: int) -> list[Tensor]:
    """At most `count` batches (rows, seq_len) of the first documents' tokens, with end-of-text between documents.

    Text of fewer than `seq_len` tokens gives one batch of a single, shorter row. Raises `UserError` for fewer than two
    tokens.
    """
    wanted = count * rows * seq_len
    ids = torch.tensor(list(islice(_tokens(documents, tokenizer), wanted)), dtype=torch.long)
    if len(ids) < 2:
        raise UserError(f"{FLAG}: there are fewer than two tokens in it")
    if len(ids) < seq_len:
        return [ids.unsqueeze(0)]
    return list(ids[: len(ids) // seq_len * seq_len].view(-1, seq_len).split(rows))


def _tokens(documents: Iterable[Document], tokenizer: Any) -> Iterator[int]:
    first, end = True, tokenizer.eos_token_id
    for document in documents:
        if document.begins and not first and end is not None:
            yield end
        first = False
        yield from tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
