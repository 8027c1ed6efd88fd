"""Every check of the live model before the first step, by small forward passes.

document mask           do documents packed into one row see each other?              --no_document_mask
chunked loss            are the head and a known scale or cap all of the logits?      --chunked_loss
domains                 does every adapted layer read complete rows?                  --domain_adapters
sequence parallelism    do split rows give the logits of complete rows?               --sequence_parallel_size

What a model does is measured, not looked up in a list of architectures. No check draws from torch's global generator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.adapters.domains import domains_of
from mora_ds.engine import zero
from mora_ds.errors import RunError, UserError
from mora_ds.models import loss
from mora_ds.parallel.limits import SEQUENCE
from mora_ds.parallel.ulysses import SequenceParallel, whole_rows
from mora_ds.train.job import Job

_DOCUMENT = 4
"""Tokens of each of the two documents that `check_document_mask` packs into a row."""

_LEAK = 0.05
"""Share of the effect of an unmasked document from which on it counts as seen. Mixture-of-experts layers round
differently with other tokens in the batch, far below this."""

_TOKENS = 4
"""Tokens per process in the rows of `check_split`."""

_SPLIT_ERROR = 2e-4
"""Permitted difference of `check_split`, as a share of the effect of all other processes' tokens."""

_SPLIT_ROUNDING = 16
"""Further permitted difference, in units of the dtype's rounding: in bf16 a new model's logits hardly differ."""


def preflight(job: Job, chunked_loss: bool, document_mask: bool) -> None:
    """Run all checks that apply to this job. Collective. Raises `UserError` naming the flag to change."""
    model = job.loaded.model
    vocab_size = model.config.get_text_config().vocab_size
    with whole_rows(model):
        if chunked_loss:
            check_chunked_loss(job.engine, vocab_size)
        if domains_of(model).names:
            check_domain_rows(job.engine, vocab_size)
        if document_mask:
            check_document_mask(job.engine, vocab_size)
    if job.sequence is not None:
        check_split(job.engine, model, job.sequence, document_mask)


@torch.no_grad()
def check_domain_rows(engine: Any, vocab_size: int) -> None:
    """Raise `UserError` for a model with an adapted layer that does not read complete rows, as `token_nll` runs it.

    Collective: a forward pass of three short rows.
    """
    domains = domains_of(engine.module)
    ids = _random_ids(engine, vocab_size, 3, 8)
    engine.eval()
    domains.set([domains.names[0], domains.names[1], domains.names[0]])
    try:
        loss.token_nll(
            engine, {"input_ids": ids, "position_ids": torch.arange(8).expand_as(ids).to(ids), "labels": ids}
        )
    except RunError as error:
        raise UserError(f"--domain_adapters: {error}") from error
    finally:
        domains.set_all(None)
        engine.train()


@torch.no_grad()
def check_document_mask(engine: zero.Engine, vocab_size: int) -> None:
    """Raise `UserError` where a document sees the one before it although its positions start again at 0.

    Only newer models of transformers take their mask from the positions (5.24: OPT, Bloom, MPT and GPT-OSS do not), and
    state-space layers have no mask. Compared: what a changed first document does to the second one's logits, with and
    without the restart of positions. Collective: two forward passes of two short rows.
    """
    rows = _random_ids(engine, vocab_size, 2, 2 * _DOCUMENT)
    rows[1, _DOCUMENT:] = rows[0, _DOCUMENT:]
    straight = torch.arange(2 * _DOCUMENT, device=rows.device).expand(2, -1)
    engine.eval()
    effects = []
    for positions in (straight % _DOCUMENT, straight):
        one, other = engine(input_ids=rows, position_ids=positions, use_cache=False).logits[:, _DOCUMENT:].double()
        effects.append((one - other).norm().item())
    engine.train()
    if effects[0] > _LEAK * effects[1]:
        raise UserError(
            "this model's attention does not stop at restarting positions, so documents packed into one row would see "
            "each other: give --no_document_mask if they may"
        )


@torch.no_grad()
def check_chunked_loss(engine: Any, vocab_size: int) -> None:
    """Raise `UserError` where the model does more to its logits than `chunk_loss` knows. Collective: a forward pass of
    one short row."""
    chunked = loss.bound(engine)
    assert chunked is not None, "chunk_loss comes first"
    engine.eval()
    with chunked.recording() as raw:
        logits = engine(input_ids=_random_ids(engine, vocab_size, 1, 16), use_cache=False).logits
    engine.train()
    expected = chunked.finish(raw[-1])
    if not torch.allclose(logits.float(), expected.float(), rtol=1e-6, atol=0):
        raise UserError(
            f"{loss.FLAG}: this model does more to its logits than its head and a known scale or cap: leave it out"
        )


@torch.no_grad()
def check_split(engine: Any, model: Any, sequence: SequenceParallel, document_mask: bool) -> None:
    """Raise `UserError` when the model does not compute the same over split rows as over complete ones.

    Ulysses carries attention over the processes and nothing else: state-space layers, convolutions over time or custom
    attention would see the tokens of one process alone. The difference is compared with the one that arises when the
    other processes' tokens are missing altogether. Collective: three forward passes of two short rows.
    """
    config = model.config.get_text_config()
    rows = _random_ids(engine, config.vocab_size, 2, _TOKENS * sequence.size)
    positions = torch.arange(rows.shape[1]).expand(2, -1).clone()
    if document_mask:  # a document that crosses a boundary, and another one that begins between two boundaries
        positions[0, 3:] -= 3
        positions[1, 2 * _TOKENS - 1 :] -= 2 * _TOKENS - 1
    batch = {"input_ids": rows, "position_ids": positions.to(engine.device)}
    part = sequence.split(batch)
    engine.eval()
    split = engine(**part, use_cache=False).logits
    with whole_rows(model):
        complete = sequence.split({"logits": engine(**batch, use_cache=False).logits})["logits"]
        alone = engine(**part, use_cache=False).logits
    engine.train()
    error, effect, size = _norm(split.double() - complete), _norm(alone.double() - complete), _norm(complete)
    if error > _SPLIT_ERROR * effect + _SPLIT_ROUNDING * torch.finfo(complete.dtype).eps * size:
        raise UserError(
            f"{SEQUENCE}: this model mixes tokens outside of the attention that can be split over processes, so a "
            "split row does not give what the complete row gives"
        )
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    if getattr(config, "sliding_window", None) and "sliding_attention" in kinds and not sequence.saw_window:
        raise UserError(f"{SEQUENCE}: this model's config has a sliding window that its attention does not receive")


def _random_ids(engine: Any, vocab_size: int, rows: int, length: int) -> Tensor:
    """(rows, length) token ids, the same on every process, on the engine's device."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(engine.device)


def _norm(tensor: Tensor) -> float:
    """The norm over the parts of all processes. Collective."""
    total = tensor.double().square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())
