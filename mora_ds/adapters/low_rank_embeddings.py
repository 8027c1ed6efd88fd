"""Training of a product of low rank that is added to embeddings and head, while their
own weights stay frozen.

    frozen weight W (V, d), a buffer
    low_rank (V + d, R)                 a parameter: A (V, R), zeros at first, above B^T (d, R)
    embeddings and head                 those of W + A B
    tied head                           the same parameter, a second time

A checkpoint has it among the other trained parameters (modules_to_save), as
`<module>.low_rank`.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_ds.adapters.new_embeddings import (
    LOW_RANK,
    FrozenEmbedding,
    FrozenHead,
    replace_tables,
)
from mora_ds.adapters.ops.spec import permutation_seed
from mora_ds.common.errors import UserError

SETTING = "`embedding_rank`"


class LowRankEmbedding(FrozenEmbedding):
    """ids (...) -> (..., d): rows of W + A B."""

    trained = LOW_RANK
    low_rank: nn.Parameter

    def forward(self, ids: Tensor) -> Tensor:
        tall, wide = self.low_rank.split(self.weight.shape)
        added = F.embedding(ids, tall) @ wide.T
        return self.scaled(F.embedding(ids, self.weight) + added)


class LowRankHead(FrozenHead):
    """x (..., d) -> logits (..., V): those of W + A B."""

    trained = LOW_RANK
    low_rank: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        tall, wide = self.low_rank.split(self.weight.shape)
        return F.linear(x, self.weight, self.bias) + F.linear(x @ wide, tall)


def train_low_rank(model: Any, rank: int, seed: int) -> None:
    """Replaces the model's embeddings and head, with frozen weights. A starts as zeros,
    B uniform within 1 / sqrt(d) of 0, as LoRA's A, by the `seed` on every process.

    Raises `UserError` where either is not a plain look-up or linear layer or is trained
    itself.
    """

    def values_of(table: Tensor, name: str) -> Tensor:
        if isinstance(table, nn.Parameter):
            raise UserError(
                f"{SETTING} keeps embeddings and head frozen, and one of them is to be trained: leave one out"
            )
        tokens, width = table.shape
        generator = torch.Generator().manual_seed(permutation_seed(seed, name, 0))
        wide = torch.rand(width, rank, generator=generator) * 2 - 1
        values = torch.cat([torch.zeros(tokens, rank), wide / width**0.5])
        return values.to(table.device, table.dtype)

    replace_tables(model, SETTING, LowRankEmbedding, LowRankHead, values_of)


def is_low_rank(name: str) -> bool:
    """Whether a trained tensor is such a product, by its name."""
    return name.rpartition(".")[2] == LOW_RANK


def with_product(table: Tensor, low_rank: Tensor) -> Tensor:
    """W + A B in fp32, of the `table` W (V, d). Raises `UserError` for another table's
    product."""
    if len(low_rank) != sum(table.shape):
        raise UserError(
            f"{LOW_RANK} has {len(low_rank)} rows, and the base a table of {tuple(table.shape)}"
        )
    tall, wide = low_rank.float().split(table.shape)
    return table.float() + tall @ wide.T


def sum_of_products(products: Iterable[tuple[Tensor, float]], tokens: int) -> Tensor:
    """low_rank (V + d, sum of ranks) in fp64 of the sum of products, each times its
    weight: they lie side by side. `tokens`: V."""
    weighted = [
        torch.cat([low[:tokens].double() * weight, low[tokens:].double()])
        for low, weight in products
    ]
    return torch.cat(weighted, dim=1)
