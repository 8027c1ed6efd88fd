"""How much each layer would be moved by some text: norms of gradients over a few batches, before any training.

    model -> squares of zero injected -> forward and backward of each batch, as a run does it
             |dL/dM|   of the square, for the operator and rank that are asked for
             |dL/dW|   of the frozen weight: g^T x of a layer's inputs x and output gradients g, one layer at a time

Both are roots of the mean, over batches, of the squared Frobenius norm of a batch's gradient (its loss being the mean
over tokens). Where M is zero dL/dM is the operator's adjoint of dL/dW: what of it the square can follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.data import Document
from mora_ds.errors import RunError, UserError

FLAG = "--probe"


@dataclass(frozen=True)
class GradientMeasures:
    """A layer's gradients."""

    module: str
    d_in: int
    d_out: int
    r_hat: int
    """Of the square that was probed."""
    square_norm: float
    """|dL/dM| at M = 0."""
    weight_norm: float
    """|dL/dW|."""

    @property
    def score(self) -> float:
        """Root mean square of dL/dM's numbers: by how much the loss falls for a parameter that Adam moves by one unit,
        to first order."""
        return self.square_norm / self.r_hat

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}


def probe(model: Any, config: MoRAConfig, batches: Sequence[Tensor]) -> list[GradientMeasures]:
    """Of every layer that `config` adapts, in the model's order. `batches`: (rows, T) token ids each.

    `model`: of transformers, bare; afterwards it has squares, of zero. Peak memory beside the model: what a training
    step keeps, every layer's input, and one gradient of the size of a weight. Raises `RunError` for a gradient that is
    not finite.
    """
    inject(model, config)
    model.eval()  # no dropout: the same on every call
    layers, norms = mora_layers(model), _Norms()
    handles = [layer.register_forward_hook(norms.watch(name)) for name, layer in layers.items()]
    squares: dict[str, float] = dict.fromkeys(layers, 0.0)
    try:
        for ids in batches:
            _loss(model, ids.to(model.device)).backward()
            for name, layer in layers.items():
                squares[name] += _energy(layer.value.grad)
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    return [_measures(name, layer, squares[name], norms.energy[name], len(batches)) for name, layer in layers.items()]


def token_batches(documents: Iterable[Document], tokenizer: Any, seq_len: int, count: int, rows: int) -> list[Tensor]:
    """At most `count` batches (rows, seq_len) of the first documents, one behind the other with end-of-text between.

    Of shorter text there is one batch of a single, shorter row. Raises `UserError` for less than two tokens.
    """
    wanted = count * rows * seq_len
    ids = torch.tensor(list(islice(_tokens(documents, tokenizer), wanted)), dtype=torch.long)
    if len(ids) < 2:
        raise UserError(f"{FLAG}: there are not even two tokens in it")
    if len(ids) < seq_len:
        return [ids.unsqueeze(0)]
    whole = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    return list(whole.split(rows))


def _tokens(documents: Iterable[Document], tokenizer: Any) -> Iterator[int]:
    first, end = True, tokenizer.eos_token_id
    for document in documents:
        if document.begins and not first and end is not None:
            yield end
        first = False
        yield from tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]


def _loss(model: Any, ids: Tensor) -> Tensor:
    """Mean over tokens."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class _Norms:
    """Sums, over batches, the energy of dL/dW of each layer, as backward passes it."""

    def __init__(self) -> None:
        self.energy: dict[str, float] = {}

    def watch(self, name: str) -> Any:
        """A forward hook for the layer of that name."""
        self.energy[name] = 0.0

        def forward(layer: AdaptedLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda g: self._add(name, x, g))

        return forward

    def _add(self, name: str, x: Tensor, g: Tensor) -> None:
        self.energy[name] += _energy(g.flatten(0, -2).T @ x.flatten(0, -2))


def _energy(gradient: Tensor | None) -> float:
    """Squared Frobenius norm; 0 of what no token has reached, such as an expert's."""
    return 0.0 if gradient is None else torch.linalg.vector_norm(gradient, dtype=torch.float64).item() ** 2


def _measures(name: str, layer: AdaptedLinear, square: float, weight: float, count: int) -> GradientMeasures:
    if not (math.isfinite(square) and math.isfinite(weight)):
        raise RunError(f"{name}: its gradient is not finite")
    norms = (math.sqrt(energy / count) for energy in (square, weight))
    return GradientMeasures(name, layer.in_features, layer.out_features, layer.value.shape[0], *norms)
