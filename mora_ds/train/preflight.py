"""Can every row of a batch have a domain of its own in this model? Asked before the first step, by a forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.adapters.domains import domains_of
from mora_ds.engine import zero
from mora_ds.errors import RunError, UserError
from mora_ds.models.loss import _DOCUMENT, _NOT_ROUNDING, bound, token_nll
from mora_ds.parallel.ulysses import FLAG, SequenceParallel, whole_rows
from mora_ds.parallel.ulysses_checks import _ROUNDING, _SMALL, _TOKENS


@torch.no_grad()
def check_rows(engine: Any, vocab_size: int) -> None:
    """Raises `UserError` for a model in which an adapted layer does not see whole rows, as `token_nll` runs it.
    Collective: a forward of three short rows on every rank."""
    domains = domains_of(engine.module)
    ids = torch.randint(vocab_size, (3, 8), generator=torch.Generator().manual_seed(0)).to(engine.device)
    engine.eval()
    domains.set([domains.names[0], domains.names[1], domains.names[0]])
    try:
        token_nll(engine, {"input_ids": ids, "position_ids": torch.arange(8).expand_as(ids).to(ids), "labels": ids})
    except RunError as error:
        raise UserError(f"--domain_adapters: {error}") from error
    finally:
        domains.set_all(None)
        engine.train()


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


@torch.no_grad()
def check_chunked_loss(engine: Any, vocab_size: int) -> None:
    """Raises `UserError` where the model does more to its logits than is known here. Collective: a forward of one short
    row on every rank."""
    chunked = bound(engine)
    assert chunked is not None
    rows = torch.randint(vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)).to(engine.device)
    engine.eval()
    with chunked.noting() as raw:
        found = engine(input_ids=rows, use_cache=False).logits
    engine.train()
    expected = chunked.finish(raw[-1])
    if not torch.allclose(found.float(), expected.float(), rtol=1e-6, atol=0):
        raise UserError(
            f"{FLAG}: this model does more to its logits than its head and a known scale or cap: leave it out"
        )


@torch.no_grad()
def check_split(engine: Any, model: Any, sequence: SequenceParallel, document_mask: bool) -> None:
    """Raises `UserError` when the model does not compute the same over split rows as over whole ones.

    Ulysses carries attention over the ranks and nothing else: state-space layers, convolutions over time or attention
    of a model's own would see the rank's tokens alone. Measured, not listed: the difference, against what it is when
    the other ranks' tokens are not there at all. Collective: three forwards of two short rows.
    """
    config = model.config.get_text_config()
    rows = torch.randint(config.vocab_size, (2, _TOKENS * sequence.size), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(rows.shape[1]).expand(2, -1).clone()
    if document_mask:  # a document that crosses a boundary, and another one that begins between two boundaries
        positions[0, 3:] -= 3
        positions[1, 2 * _TOKENS - 1 :] -= 2 * _TOKENS - 1
    batch = {"input_ids": rows.to(engine.device), "position_ids": positions.to(engine.device)}
    part = sequence.split(batch)
    engine.eval()
    split = engine(**part, use_cache=False).logits
    with whole_rows(model):
        whole = sequence.split({"logits": engine(**batch, use_cache=False).logits})["logits"]
        alone = engine(**part, use_cache=False).logits
    engine.train()
    error, scale, size = _norm(split, whole), _norm(alone, whole), _norm(whole)
    if error > _SMALL * scale + _ROUNDING * torch.finfo(whole.dtype).eps * size:
        raise UserError(
            f"{FLAG}: this model mixes tokens outside of the attention that can be split over ranks, so a split row "
            "does not give what the whole row gives"
        )
    if _has_window(config) and not sequence.saw_window:
        raise UserError(f"{FLAG}: this model's config has a sliding window that its attention is not told of")


def _has_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return bool(getattr(config, "sliding_window", None)) and "sliding_attention" in kinds


def _norm(tensor: Tensor, other: Tensor | float = 0.0) -> float:
    """Of the difference, over all ranks."""
    total = (tensor.double() - other).square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())
