"""The loss of packed rows, and whether a model keeps their documents apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.data import IGNORED
from mora_ds.engine import zero
from mora_ds.errors import UserError
from mora_ds.models.loss import bound


def token_nll(model: Callable[..., object], batch: Mapping[str, Tensor]) -> Tensor:
    """Summed negative log-likelihood (nats, fp32) of a batch's labels, which are already shifted: labels[t] is what
    follows input_ids[t], or IGNORED. Restarting `position_ids` keep attention inside each document. A chunk at a time
    where the model was given to `chunk_loss`."""
    chunked = bound(model)
    return whole_nll(model, batch) if chunked is None else chunked.nll(model, batch)


def whole_nll(model: Callable[..., object], batch: Mapping[str, Tensor]) -> Tensor:
    """The same from the logits of the whole batch."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits  # type: ignore[attr-defined]
    labels = batch["labels"].flatten()
    return F.cross_entropy(logits.flatten(0, -2).float(), labels, ignore_index=IGNORED, reduction="sum")


def row_nll(model: Callable[..., object], batch: Mapping[str, Tensor]) -> Tensor:
    """(B,): what `token_nll` sums, row by row."""
    if (chunked := bound(model)) is not None:
        return chunked.row_nll(model, batch)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits  # type: ignore[attr-defined]
    labels = batch["labels"]
    nll = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return nll.view(labels.shape).sum(dim=-1)


# -- documents in one row ----------------------------------------------------------------------------------------------

_DOCUMENT = 4
"""Tokens of each of the two documents that `check_document_mask` packs into a row."""

_NOT_ROUNDING = 0.05
"""Share of a whole leak from which on one is seen: experts that get other tokens round otherwise, far below this."""


@torch.no_grad()
def check_document_mask(engine: zero.Engine, vocab_size: int) -> None:
    """Raises `UserError` when the model lets a document see the one before it, restarting positions or not.

    Only transformers' newer models take their mask from the positions (5.24: OPT, Bloom, MPT and GPT-OSS do not), and
    state-space layers know no mask. Measured, not listed: what a changed first document does to the second one, against
    what it does without the restart. Collective: two forwards of two short rows on every rank.
    """
    rows = torch.randint(vocab_size, (2, 2 * _DOCUMENT), generator=torch.Generator().manual_seed(0))
    rows[1, _DOCUMENT:] = rows[0, _DOCUMENT:]
    straight = torch.arange(2 * _DOCUMENT).expand(2, -1)
    engine.eval()
    effects = []
    for positions in (straight % _DOCUMENT, straight):
        inputs = {"input_ids": rows.to(engine.device), "position_ids": positions.to(engine.device)}
        one, other = engine(**inputs, use_cache=False).logits[:, _DOCUMENT:].double()
        effects.append((one - other).norm().item())
    engine.train()
    if effects[0] > _NOT_ROUNDING * effects[1]:
        raise UserError(
            "this model's attention does not stop at restarting positions, so documents packed into one row would see "
            "each other: say --no_document_mask if they may"
        )
