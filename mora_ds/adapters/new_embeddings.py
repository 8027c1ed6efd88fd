"""Training of the last rows of the embeddings (and of the head), while the earlier rows stay frozen.

    frozen weight (V, d), a buffer      rows first .. V-1 of it are never read
    new_rows (V - first, d)             a parameter: small, and sharded by ZeRO as the adapters are
    tied head                           the same parameter, a second time

A checkpoint has it among the other trained parameters (modules_to_save), as `<module>.new_rows`: the last rows of
`<module>.weight`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_ds.common.errors import UserError

NEW_ROWS = "new_rows"
FLAG = "--train_new_embeddings"


class NewRowEmbedding(nn.Embedding):
    """ids (...) -> (..., d): row `id` of the frozen weight, or of `new_rows` from `first` on."""

    weight: Tensor  # a buffer here

    def __init__(self, base: nn.Embedding, new_rows: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = base.weight.shape[0], base.weight.shape[1], None
        self.first = self.num_embeddings - len(new_rows)
        self.register_buffer("weight", base.weight, persistent=False)  # frozen: one object where it is tied
        self.new_rows = new_rows

    def forward(self, ids: Tensor) -> Tensor:
        is_new = (ids >= self.first).unsqueeze(-1)
        new = F.embedding((ids - self.first).clamp(min=0), self.new_rows)
        return torch.where(is_new, new, F.embedding(ids, self.weight))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, trained from row {self.first}"


class NewRowHead(nn.Linear):
    """x (..., d) -> logits (..., V): the last ones from `new_rows`."""

    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(self, base: nn.Linear, new_rows: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = base.weight.shape
        self.first = self.out_features - len(new_rows)
        self.register_buffer("weight", base.weight, persistent=False)
        self.register_buffer("bias", base.bias, persistent=False)
        self.new_rows = new_rows

    def forward(self, x: Tensor) -> Tensor:
        old, new = F.linear(x, self.weight[: self.first]), F.linear(x, self.new_rows)
        logits = torch.cat([old, new], dim=-1)
        return logits if self.bias is None else logits + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, trained from row {self.first}"


def train_new_rows(model: Any, first: int) -> None:
    """Replaces the model's embeddings and its head, whose frozen weights are buffers already.

    Raises `UserError` where either is not a plain look-up or linear layer, and where there is no row from `first` on.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding).forward is not nn.Embedding.forward:
        raise UserError(f"{FLAG}: the embeddings are a {type(embedding).__name__}, which computes more than a look-up")
    if type(head).forward is not nn.Linear.forward:
        raise UserError(f"{FLAG}: the output head is a {type(head).__name__}, no linear layer")
    if not 0 < first < len(embedding.weight):
        raise UserError(f"{FLAG}: the model has rows 0 to {len(embedding.weight) - 1}, none from {first} on is new")
    rows = nn.Parameter(embedding.weight.data[first:].clone())
    tied = head.weight is embedding.weight  # not by address: a planned model has none
    head_rows = rows if tied else nn.Parameter(head.weight.data[first:].clone())
    names = {id(module): name for name, module in model.named_modules()}
    for old, new in ((embedding, NewRowEmbedding(embedding, rows)), (head, NewRowHead(head, head_rows))):
        parent, _, child = names[id(old)].rpartition(".")
        new.train(old.training)
        setattr(model.get_submodule(parent), child, new)


def stands_for(name: str) -> str:
    """The parameter of the base that a trained tensor replaces, or whose last rows it replaces."""
    return f"{name.removesuffix(NEW_ROWS)}weight" if is_new_rows(name) else name


def is_new_rows(name: str) -> bool:
    """Whether a trained tensor is the last rows of a parameter, by its name."""
    return name.rpartition(".")[2] == NEW_ROWS


def with_last_rows(table: Tensor, rows: Tensor) -> Tensor:
    """A copy of `table` (V, d) with its last rows replaced by `rows`."""
    return torch.cat([table[: len(table) - len(rows)], rows.to(table.dtype)])
