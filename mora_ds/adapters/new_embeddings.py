"""Training of some rows of the embeddings (and of the head), while the others stay frozen: the last ones, which an
extension of the vocabulary added, or those that a domain needs (`train.embedding_rows` chooses them).

    frozen weight (V, d), a buffer      its rows that are trained are never read
    new_rows (K, d)                     a parameter: small, and sharded by ZeRO as the adapters are
    tied head                           the same parameter, a second time

A checkpoint has it among the other trained parameters (modules_to_save), as `<module>.new_rows`; the adapter's config
says which rows of `<module>.weight` they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_ds.common.errors import UserError

NEW_ROWS, LOW_RANK = "new_rows", "low_rank"
"""The trained tensors of these modules and of those of `low_rank_embeddings`."""
FLAG = "--train_new_embeddings"
ROWS_FLAG = "--train_embedding_rows"


class NewRowEmbedding(nn.Embedding):
    """ids (...) -> (..., d): row `id` of the frozen weight, or its row of `new_rows`."""

    weight: Tensor  # a buffer here
    place: Tensor
    """(V,) int64: where a row lies in `new_rows`; -1: it is frozen."""

    def __init__(self, base: nn.Embedding, new_rows: nn.Parameter, rows: Tensor) -> None:
        """`rows` (K,) int64: those that are trained."""
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = base.weight.shape[0], base.weight.shape[1], None
        self.register_buffer("weight", base.weight, persistent=False)  # frozen: one object where it is tied
        place = torch.full((self.num_embeddings,), -1, device=rows.device)
        place = place.index_copy(0, rows, torch.arange(len(rows), device=rows.device))
        self.register_buffer("place", place, persistent=False)
        self.new_rows = new_rows

    def forward(self, ids: Tensor) -> Tensor:
        place = self.place[ids]
        new = F.embedding(place.clamp(min=0), self.new_rows)
        return torch.where((place >= 0).unsqueeze(-1), new, F.embedding(ids, self.weight))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, of which {len(self.new_rows)} are trained"


class NewRowHead(nn.Linear):
    """x (..., d) -> logits (..., V): some from `new_rows`."""

    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]
    rows: Tensor

    def __init__(self, base: nn.Linear, new_rows: nn.Parameter, rows: Tensor, first: int | None) -> None:
        """`rows` (K,) int64: those that are trained. `first`: of them, where they are the last ones."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = base.weight.shape
        self.first = first
        self.register_buffer("weight", base.weight, persistent=False)
        self.register_buffer("bias", base.bias, persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.new_rows = new_rows

    def forward(self, x: Tensor) -> Tensor:
        new = F.linear(x, self.new_rows)
        if self.first is None:
            logits = F.linear(x, self.weight).index_copy(-1, self.rows, new)
        else:
            logits = torch.cat([F.linear(x, self.weight[: self.first]), new], dim=-1)
        return logits if self.bias is None else logits + self.bias

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, of which {len(self.new_rows)} are trained"


def train_new_rows(model: Any, first: int, chosen: Sequence[int] = ()) -> None:
    """Replaces the model's embeddings and its head, whose frozen weights are buffers already. `chosen`: the rows that
    are trained, ascending; without them those from `first` on.

    Raises `UserError` where either is not a plain look-up or linear layer, and where there are no such rows.
    """
    flag = ROWS_FLAG if chosen else FLAG
    embedding, head = plain_tables(model, flag)
    last = len(embedding.weight) - 1
    if chosen and not (chosen[0] >= 0 and chosen[-1] <= last and all(a < b for a, b in pairwise(chosen))):
        raise UserError(f"{flag}: the rows are not ascending, or the model, with rows 0 to {last}, has not all of them")
    if not chosen and not 0 < first <= last:
        raise UserError(f"{flag}: the model has rows 0 to {last}, none from {first} on is new")
    rows = torch.tensor(chosen or range(first, last + 1), device=embedding.weight.device)
    values = nn.Parameter(embedding.weight.data[rows])
    head_values = values if is_tied(embedding, head) else nn.Parameter(head.weight.data[rows])
    new_head = NewRowHead(head, head_values, rows, None if chosen else first)
    replace_modules(model, {embedding: NewRowEmbedding(embedding, values, rows), head: new_head})


def plain_tables(model: Any, flag: str) -> tuple[nn.Embedding, nn.Linear]:
    """The model's embeddings and its head. Raises `UserError` where either is not a plain look-up or linear layer."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding).forward is not nn.Embedding.forward:
        raise UserError(f"{flag}: the embeddings are a {type(embedding).__name__}, which computes more than a look-up")
    if getattr(type(head), "forward", None) is not nn.Linear.forward:  # None for a model without a head
        raise UserError(f"{flag}: the output head is a {type(head).__name__}, no linear layer")
    return embedding, head


def is_tied(embedding: nn.Embedding, head: nn.Linear) -> bool:
    """Whether both have one weight."""
    return head.weight is embedding.weight  # not by address: a planned model has none


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts a module in the place of another one, wherever in the model that is."""
    names = {id(module): name for name, module in model.named_modules()}
    for old, new in replacements.items():
        parent, _, child = names[id(old)].rpartition(".")
        new.train(old.training)
        setattr(model.get_submodule(parent), child, new)


def stands_for(name: str) -> str:
    """The parameter of the base that a trained tensor replaces, of which it replaces rows, or to which it adds."""
    module, dot, part = name.rpartition(".")
    return f"{module}{dot}weight" if part in (NEW_ROWS, LOW_RANK) else name


def is_new_rows(name: str) -> bool:
    """Whether a trained tensor is some rows of a parameter, by its name."""
    return name.rpartition(".")[2] == NEW_ROWS


def chosen_rows(facts: Mapping[str, Any]) -> list[int]:
    """The rows that were chosen for training, by an adapter's facts; none where they are the last ones."""
    rows: list[int] = facts.get("config", {}).get("trained_rows", [])
    return rows


def rows_of(table: Tensor, count: int, chosen: Sequence[int]) -> Tensor:
    """Which of the rows of `table` (V, d) a tensor of `count` rows stands for: (count,) int64. Raises `UserError` where
    the chosen ones are others."""
    if chosen and not (len(chosen) == count and min(chosen) >= 0 and max(chosen) < len(table)):
        raise UserError(f"the adapter's trained_rows are no {count} rows of a table of {len(table)}")
    return torch.tensor(chosen or range(len(table) - count, len(table)))


def with_rows(table: Tensor, values: Tensor, chosen: Sequence[int]) -> Tensor:
    """A copy of `table` (V, d) with the chosen rows, or its last ones, replaced by `values`."""
    return table.index_copy(0, rows_of(table, len(values), chosen), values.to(table.dtype))
