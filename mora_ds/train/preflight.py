"""Every check of the live model before the first step, by small forward passes.

document mask           do documents packed into one row see each other?              --no_document_mask
chunked loss            are the head and a known scale or cap all of the logits?      --chunked_loss
domains                 does every layer with domains read complete rows?             --target_modules
sequence parallelism    do split rows give the logits of complete rows?               --sequence_parallel_size

What a model does is measured, not looked up in a list of architectures. No check draws
from torch's global generator.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.adapters.domains import domains_of
from mora_ds.common.errors import RunError, UserError
from mora_ds.config.arguments import Arguments
from mora_ds.config.research import DOMAINS
from mora_ds.data.documents import Documents
from mora_ds.models import loss
from mora_ds.models.attention import NAME, attention_of, model_inputs
from mora_ds.parallel.limits import SEQUENCE
from mora_ds.parallel.ulysses import SequenceParallel
from mora_ds.train.beside import beside_training
from mora_ds.train.job import Job
from mora_ds.train.loader import Rows

logger = logging.getLogger(__name__)

_DOCUMENT = 4
"""Tokens of each of the two documents that `check_document_mask` packs into a row."""

_LEAK = 0.05
"""A document counts as seen from this share of its effect without a mask on. Experts
round differently with other tokens in the batch, far below this."""

_STATEFUL = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}
"""Kinds of layers, by transformers' names, that carry a row's tokens on without a
mask."""

_TOKENS = 4
"""Tokens per process in the rows of `check_split`."""

_SPLIT_ERROR = 2e-4
"""Permitted difference of `check_split`, as a share of the effect of all other
tokens."""

_SPLIT_ROUNDING = 16
"""Further permitted difference, in units of the dtype's rounding: in bf16 the logits of
a new model hardly differ."""


def preflight(job: Job, arguments: Arguments) -> None:
    """Run all checks of this job. Collective. Raises `UserError` naming the flag to
    change."""
    model = job.loaded.model
    training = arguments.training
    document_mask = arguments.data.document_mask
    with beside_training(job.engine, whole=True):
        if job.state.chunked_loss and not logits_are_known(job.engine):
            problem = "this model does more to its logits than its head and a known scale or cap"
            if training.chunked_loss:
                raise UserError(f"{loss.FLAG}: {problem}: leave it out")
            logger.info(f"loss: from the logits of complete batches, because {problem}")
            loss.whole_loss(model)
            job.state.chunked_loss = False
        check_domains(job.engine)
        check_attention(job.engine, document_mask)
    if job.sequence is not None:
        check_split(job.engine, model, job.sequence, document_mask)


def check_domains(engine: Any) -> None:
    """Raise `UserError` where a layer with domains does not read complete rows, as
    `token_nll` runs it. Collective."""
    domains = domains_of(getattr(engine, "module", engine))
    if not domains.names:
        return
    ids = _random_ids(engine, 3, 8)
    batch = {**_batch(ids, torch.arange(8)), "labels": ids}
    first, second = domains.names[:2]
    try:
        with beside_training(engine), domains.of_rows([first, second, first]):
            loss.token_nll(engine, batch)
    except RunError as error:
        raise UserError(f"{DOMAINS}: {error}") from error


def check_attention(engine: Any, document_mask: bool) -> None:
    """Raise `UserError` where documents see each other, or the config's window is
    lost."""
    if document_mask:
        check_document_mask(engine)
    model = getattr(engine, "module", engine)
    if attention_of(model) == NAME and _has_window(model.config.get_text_config()):
        check_window(engine)


def check_document_mask(engine: Any) -> None:
    """Raise `UserError` where a document sees the one before it although its positions
    start again at 0.

    Not every model of transformers takes its mask from the positions (5.24: Bloom and
    MPT do not), state-space layers have no mask, and FlashAttention takes rows for
    packed ones only where there is a single row. Compared: what a changed first
    document does to the second one's logits, with and without the restart of positions,
    in batches of one row and of two. Collective: four forward passes of short rows.
    """
    straight = torch.arange(2 * _DOCUMENT)
    config = getattr(engine, "module", engine).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    # Their effect is too small at a new model's weights to stand out, and grows in
    # training
    leak = 0.0 if _STATEFUL & set(kinds) else _LEAK
    permitted = leak * _effect(engine, 2, straight)
    for rows in (1, 2):
        if _effect(engine, rows, straight % _DOCUMENT) > permitted:
            raise UserError(
                "this model's attention does not stop at restarting positions, so documents packed into one row would "
                f"see each other (in batches of {rows} rows): leave --attn_implementation at auto, or give "
                "--no_document_mask if they may"
            )


def _effect(engine: Any, rows: int, positions: Tensor) -> float:
    """The largest change of a row's second document, as a norm of its logits, when the
    first one is another. `rows`: of a batch, 1 or 2."""
    ids = _random_ids(engine, 2, 2 * _DOCUMENT)
    ids[1, _DOCUMENT:] = ids[0, _DOCUMENT:]
    logits = []
    with beside_training(engine):
        for group in ids.split(rows):
            inputs = model_inputs(engine, _batch(group, positions))
            logits += engine(**inputs).logits[:, _DOCUMENT:].double()
    return (logits[1] - logits[0]).norm().item()


def _batch(ids: Tensor, positions: Tensor) -> Rows:
    """Token ids (rows, T) with their positions, (T,) for all rows alike or (rows, T),
    and the documents that these make."""
    every = positions.expand(len(ids), -1)
    return {
        "input_ids": ids,
        "position_ids": every.to(ids.device),
        "documents": Documents.of(every).to(ids.device),
    }


def check_window(engine: Any) -> None:
    """Raise `UserError` where the config has a sliding window that attention by
    documents does not receive. Collective: a forward pass of one short row."""
    batch = _batch(_random_ids(engine, 1, 2 * _DOCUMENT), torch.arange(2 * _DOCUMENT))
    with beside_training(engine):
        engine(**model_inputs(engine, batch))
    if batch["documents"].windows == {None}:
        raise UserError(
            "this model's config has a sliding window that its attention does not receive: "
            "give --attn_implementation sdpa"
        )


def _has_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return (
        bool(getattr(config, "sliding_window", None)) and "sliding_attention" in kinds
    )


def logits_are_known(engine: Any) -> bool:
    """Whether the model's logits are what `chunk_loss` takes them for: its head's
    output, scaled or capped. Collective: a forward pass of one short row."""
    chunked = loss.bound(engine)
    assert chunked is not None, "chunk_loss comes first"
    with beside_training(engine), chunked.recording() as raw:
        logits = engine(input_ids=_random_ids(engine, 1, 16), use_cache=False).logits
        if not raw:
            return False
        finished = chunked.finish(raw[-1]).float()
        # Some models cut logits of padding off
        is_whole = finished.shape == logits.shape
        return is_whole and torch.allclose(logits.float(), finished, rtol=1e-6, atol=0)


def check_split(
    engine: Any, model: Any, sequence: SequenceParallel, document_mask: bool
) -> None:
    """Raise `UserError` when the model does not compute the same over split rows as
    over complete ones.

    Ulysses carries attention over the processes and nothing else: state-space layers,
    convolutions over time or custom attention would see the tokens of one process
    alone. The difference is compared with the one that arises when the other processes'
    tokens are missing altogether. Collective: three forward passes of two short rows.
    """
    rows = _random_ids(engine, 2, _TOKENS * sequence.size)
    positions = torch.arange(rows.shape[1]).expand(2, -1).clone()
    # One document then crosses a boundary between processes, and another one begins
    # between two boundaries.
    if document_mask:
        positions[0, 3:] -= 3
        positions[1, 2 * _TOKENS - 1 :] -= 2 * _TOKENS - 1
    batch = _batch(rows, positions)
    local_batch = sequence.split(batch)
    with beside_training(engine):
        split = engine(**model_inputs(engine, local_batch)).logits
    own_documents = Documents.of(local_batch["position_ids"].cpu())
    local_batch["documents"] = own_documents.to(engine.device)
    with beside_training(engine, whole=True):
        whole = {"logits": engine(**model_inputs(engine, batch)).logits}
        complete = sequence.split(whole)["logits"]
        alone = engine(**model_inputs(engine, local_batch)).logits
    error = _norm(split.double() - complete)
    effect = _norm(alone.double() - complete)
    rounding = torch.finfo(complete.dtype).eps * _norm(complete)
    if error > _SPLIT_ERROR * effect + _SPLIT_ROUNDING * rounding:
        raise UserError(
            f"{SEQUENCE}: this model mixes tokens outside of the attention that can be split over processes, so a "
            "split row does not give what the complete row gives"
        )
    if _has_window(model.config.get_text_config()) and not sequence.saw_window:
        raise UserError(
            f"{SEQUENCE}: this model's config has a sliding window that its attention does not receive"
        )


def _random_ids(engine: Any, rows: int, length: int) -> Tensor:
    """(rows, length) token ids, the same on every process, on the engine's device."""
    vocab_size = getattr(engine, "module", engine).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (rows, length), generator=generator)
    return ids.to(engine.device)


def _norm(tensor: Tensor) -> float:
    """The norm over the parts of all processes. Collective."""
    total = tensor.double().square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())
