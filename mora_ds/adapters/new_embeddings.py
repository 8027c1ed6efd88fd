"""Training of the rows of embeddings and head that an extension of the vocabulary
added, while the others stay frozen.

    frozen weight (V, d), a buffer      its last K rows are never read
    new_rows (K, d)                     a parameter: small, and sharded by ZeRO as the adapters are
    tied head                           the same parameter, a second time

A checkpoint has it among the other trained parameters (modules_to_save), as
`<module>.new_rows`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_ds.common.errors import UserError

NEW_ROWS = "new_rows"
LOW_RANK = "low_rank"
"""The trained tensors of these modules and of those of `low_rank_embeddings`."""
SETTING = "`new_rows_from`"


class FrozenEmbedding(nn.Embedding):
    """The table of another module as a buffer, one object where it is tied, and what is
    trained of it."""

    trained: ClassVar[str]
    """Name of the parameter."""
    weight: Tensor
    embed_scale: Tensor | None
    """What the model multiplies rows by as it reads them (Gemma, MiniCPM3)."""

    def __init__(self, base: nn.Embedding, values: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.register_parameter(self.trained, values)
        self.num_embeddings, self.embedding_dim = base.weight.shape
        self.padding_idx = None
        self.register_buffer("weight", base.weight, persistent=False)
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            scale = torch.as_tensor(scale)  # XGLM has a float
        self.register_buffer("embed_scale", scale, persistent=False)

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows (..., d) of the table as the model reads them."""
        if self.embed_scale is None:
            return rows
        return rows * self.embed_scale.to(rows.dtype)

    def extra_repr(self) -> str:
        # DeepSpeed prints each module, and torch's text needs attributes that are not
        # here
        return f"{self.num_embeddings}, {self.embedding_dim}"


class FrozenHead(nn.Linear):
    """The table and the bias of another module as buffers, and what is trained of the
    table."""

    trained: ClassVar[str]
    """Name of the parameter."""
    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(self, base: nn.Linear, values: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.register_parameter(self.trained, values)
        self.out_features, self.in_features = base.weight.shape
        self.register_buffer("weight", base.weight, persistent=False)
        self.register_buffer("bias", base.bias, persistent=False)


class NewRowEmbedding(FrozenEmbedding):
    """ids (...) -> (..., d): rows of the frozen weight, the last K of `new_rows`."""

    trained = NEW_ROWS
    new_rows: nn.Parameter

    def forward(self, ids: Tensor) -> Tensor:
        first = self.num_embeddings - len(self.new_rows)
        new = F.embedding((ids - first).clamp(min=0), self.new_rows)
        old = F.embedding(ids, self.weight)
        return self.scaled(torch.where((ids >= first).unsqueeze(-1), new, old))


class NewRowHead(FrozenHead):
    """x (..., d) -> logits (..., V): the last K from `new_rows`."""

    trained = NEW_ROWS
    new_rows: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        old = F.linear(x, self.weight[: self.out_features - len(self.new_rows)])
        logits = torch.cat([old, F.linear(x, self.new_rows)], dim=-1)
        return logits if self.bias is None else logits + self.bias


def train_new_rows(model: Any, first: int) -> None:
    """Replace the model's embeddings and its head, whose frozen weights are buffers
    already, by ones whose rows from `first` on are trained.

    Raises `UserError` where either is not a plain look-up or linear layer, and where
    there are no such rows.
    """

    def values_of(table: Tensor, _: str) -> Tensor:
        if not 0 < first < len(table):
            raise UserError(
                f"{SETTING}: the model has rows 0 to {len(table) - 1}, none from {first} on is new"
            )
        return table.data[first:].clone()

    replace_tables(model, SETTING, NewRowEmbedding, NewRowHead, values_of)


def replace_tables(
    model: Any,
    setting: str,
    embedding_class: type[FrozenEmbedding],
    head_class: type[FrozenHead],
    values_of: Callable[[Tensor, str], Tensor],
) -> None:
    """Replaces the model's embeddings and head. What is trained starts from
    `values_of(weight, "embeddings")` and `values_of(weight, "head")`; it is one
    parameter where these are tied. Raises `UserError` as `plain_tables` does."""
    embedding, head = plain_tables(model, setting)
    values = nn.Parameter(values_of(embedding.weight, "embeddings"))
    head_values = values
    # Not by address: the tensors of a planned model have none
    if head.weight is not embedding.weight:
        head_values = nn.Parameter(values_of(head.weight, "head"))
    replace(model, embedding, embedding_class(embedding, values))
    replace(model, head, head_class(head, head_values))


def plain_tables(model: Any, setting: str) -> tuple[nn.Embedding, nn.Linear]:
    """The model's embeddings and its head. Raises `UserError` where either is not a
    plain look-up, with a scale or without, or linear layer."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    # Gemma3TextScaledWordEmbedding and its like are look-ups times `embed_scale`
    is_scaled = type(embedding).__name__.endswith("ScaledWordEmbedding")
    # A model without embeddings has None, whose type has no `forward`
    forward = getattr(type(embedding), "forward", None)
    if forward is not nn.Embedding.forward and not is_scaled:
        raise UserError(
            f"{setting}: the embeddings are a {type(embedding).__name__}, no plain look-up"
        )
    if getattr(type(head), "forward", None) is not nn.Linear.forward:
        raise UserError(
            f"{setting}: the output head is a {type(head).__name__}, no linear layer"
        )
    return embedding, head


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one, wherever in the model that is: a
    model's own setters may be missing."""
    (name,) = (name for name, module in model.named_modules() if module is old)
    model.set_submodule(name, new.train(old.training))


def stands_for(name: str) -> str:
    """The base's parameter that a trained tensor replaces or changes."""
    module, dot, ending = name.rpartition(".")
    return f"{module}{dot}weight" if ending in (NEW_ROWS, LOW_RANK) else name


def is_new_rows(name: str) -> bool:
    """Whether a trained tensor is some rows of a parameter, by its name."""
    return name.rpartition(".")[2] == NEW_ROWS


def with_new_rows(table: Tensor, values: Tensor) -> Tensor:
    """A copy of `table` (V, d) whose last rows are replaced by `values`."""
    return torch.cat([table[: len(table) - len(values)], values.to(table.dtype)])
