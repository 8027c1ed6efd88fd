"""Checks of the model before the first step, by small forward passes.

document mask           do documents in one packed sequence attend to each other?     --no_document_mask
chunked loss            are logits only the head's output, scaled or capped?          --chunked_loss
domains                 does every layer with domains read full sequences?            --target_modules
sequence parallelism    do split sequences give the logits of full sequences?         --sequence_parallel_size

The behavior of a model is measured, not looked up in a list of architectures. No check
draws from torch's global generator.
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
from mora_ds.data.documents import Batch, Documents
from mora_ds.models import loss
from mora_ds.models.attention import NAME, attention_of, model_inputs
from mora_ds.parallel.limits import SEQUENCE
from mora_ds.parallel.ulysses import SequenceParallel
from mora_ds.train.non_fatal import eval_mode
from mora_ds.train.training_setup import TrainingSetup

logger = logging.getLogger(__name__)

_DOCUMENT = 4
"""Tokens of each of the two documents in a sequence of `check_document_mask`."""

_LEAK = 0.05
"""Permitted effect of another document, as a fraction of its effect without a mask. The
rounding of experts, which depends on the other tokens in the batch, is far smaller."""

_STATEFUL = {"conv", "linear_attention", "hybrid", "hybrid_sliding"}
"""Layer types, by transformers' names, whose state passes on to later tokens without a
mask."""

_TOKENS = 4
"""Tokens per rank in the sequences of `check_split`."""

_SPLIT_ERROR = 2e-4
"""Permitted error of `check_split`, as a fraction of the effect of the other ranks'
tokens."""

_SPLIT_ROUNDING = 16
"""Additional permitted error, in machine epsilons: in bf16 the logits of a new model
hardly differ."""


def preflight(setup: TrainingSetup, arguments: Arguments) -> None:
    """Run all checks. Collective. Raises `UserError` that names the flag to change."""
    model = setup.loaded.model
    training = arguments.training
    document_mask = arguments.data.document_mask
    with eval_mode(setup.engine, unsplit=True):
        if setup.state.chunked_loss and not logits_are_known(setup.engine):
            problem = "this model changes the output of its head by more than a known scale or cap"
            if training.chunked_loss:
                raise UserError(f"{loss.FLAG}: {problem}: leave it out")
            logger.info(f"loss: computed from all logits at once, because {problem}")
            loss.unchunked_loss(model)
            setup.state.chunked_loss = False
        check_domains(setup.engine)
        check_attention(setup.engine, document_mask)
    if setup.sequence is not None:
        check_split(setup.engine, model, setup.sequence, document_mask)


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
        with eval_mode(engine), domains.of_rows([first, second, first]):
            loss.token_nll(engine, batch)
    except RunError as error:
        raise UserError(f"{DOMAINS}: {error}") from error


def check_attention(engine: Any, document_mask: bool) -> None:
    """Raise `UserError` if documents attend to each other, or if attention ignores the
    config's sliding window."""
    if document_mask:
        check_document_mask(engine)
    model = getattr(engine, "module", engine)
    if attention_of(model) == NAME and _has_window(model.config.get_text_config()):
        check_window(engine)


def check_document_mask(engine: Any) -> None:
    """Raise `UserError` if a document attends to the previous one although its
    positions restart at 0.

    Reasons: some models of transformers do not derive masks from positions (5.24: Bloom
    and MPT), state-space layers have no mask, and FlashAttention detects packed
    documents only in batches of one sequence. The check changes the first document and
    measures the effect on the logits of the second one, with and without the restart of
    positions, in batches of one and two sequences. Collective: forward passes of short
    sequences.
    """
    no_restart = torch.arange(2 * _DOCUMENT)
    config = getattr(engine, "module", engine).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    # At the weights of a new model the effect of such layers is below the tolerance,
    # but it grows in training
    leak = 0.0 if _STATEFUL & set(kinds) else _LEAK
    permitted = leak * _effect(engine, 2, no_restart)
    for batch_size in (1, 2):
        if _effect(engine, batch_size, no_restart % _DOCUMENT) > permitted:
            raise UserError(
                "this model's attention does not stop at restarting positions, so documents packed into one sequence "
                f"would attend to each other (batch size {batch_size}): leave --attn_implementation at auto, or give "
                "--no_document_mask to permit it"
            )


def _effect(engine: Any, batch_size: int, positions: Tensor) -> float:
    """The norm of the change of the second document's logits when the first document
    changes. `batch_size`: 1 or 2 sequences."""
    ids = _random_ids(engine, 2, 2 * _DOCUMENT)
    ids[1, _DOCUMENT:] = ids[0, _DOCUMENT:]
    logits = []
    with eval_mode(engine):
        for group in ids.split(batch_size):
            inputs = model_inputs(engine, _batch(group, positions))
            logits += engine(**inputs).logits[:, _DOCUMENT:].double()
    return (logits[1] - logits[0]).norm().item()


def _batch(ids: Tensor, positions: Tensor) -> Batch:
    """A batch of token ids (B, T), their positions (T,) or (B, T), and the documents
    that start where positions restart."""
    position_ids = positions.expand(len(ids), -1)
    return {
        "input_ids": ids,
        "position_ids": position_ids.to(ids.device),
        "documents": Documents.of(position_ids).to(ids.device),
    }


def check_window(engine: Any) -> None:
    """Raise `UserError` if the config has a sliding window that the model does not pass
    to document attention. Collective: a forward pass of one short sequence."""
    batch = _batch(_random_ids(engine, 1, 2 * _DOCUMENT), torch.arange(2 * _DOCUMENT))
    with eval_mode(engine):
        engine(**model_inputs(engine, batch))
    if batch["documents"].windows == {None}:
        raise UserError(
            "this model does not pass the sliding window of its config to its attention: "
            "give --attn_implementation sdpa"
        )


def _has_window(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return (
        bool(getattr(config, "sliding_window", None)) and "sliding_attention" in kinds
    )


def logits_are_known(engine: Any) -> bool:
    """Whether the logits are as `chunk_loss` assumes: the head's output, scaled or
    capped. Collective: a forward pass of one short sequence."""
    chunked = loss.chunked_head_of(engine)
    assert chunked is not None, "chunk_loss comes first"
    with eval_mode(engine), chunked.recording() as raw:
        logits = engine(input_ids=_random_ids(engine, 1, 16), use_cache=False).logits
        if not raw:
            return False
        finished = chunked.finish(raw[-1]).float()
        # Some models remove the logits of padding
        same_shape = finished.shape == logits.shape
        return same_shape and torch.allclose(
            logits.float(), finished, rtol=1e-6, atol=0
        )


def check_split(
    engine: Any, model: Any, sequence: SequenceParallel, document_mask: bool
) -> None:
    """Raise `UserError` if split sequences do not give the logits of full sequences.

    Ulysses connects only the attention of the ranks: state-space layers, convolutions
    over time and custom attention would see one rank's tokens alone. The error is
    compared with the effect of removing the other ranks' tokens. Collective: three
    forward passes of two short sequences.
    """
    ids = _random_ids(engine, 2, _TOKENS * sequence.size)
    positions = torch.arange(ids.shape[1]).expand(2, -1).clone()
    # One document crosses a boundary between ranks, another one starts between two
    # boundaries.
    if document_mask:
        positions[0, 3:] -= 3
        positions[1, 2 * _TOKENS - 1 :] -= 2 * _TOKENS - 1
    batch = _batch(ids, positions)
    local_batch = sequence.split(batch)
    with eval_mode(engine):
        split = engine(**model_inputs(engine, local_batch)).logits
    own_documents = Documents.of(local_batch["position_ids"].cpu())
    local_batch["documents"] = own_documents.to(engine.device)
    with eval_mode(engine, unsplit=True):
        full = {"logits": engine(**model_inputs(engine, batch)).logits}
        expected = sequence.split(full)["logits"]
        alone = engine(**model_inputs(engine, local_batch)).logits
    error = _norm(split.double() - expected)
    effect = _norm(alone.double() - expected)
    rounding = torch.finfo(expected.dtype).eps * _norm(expected)
    if error > _SPLIT_ERROR * effect + _SPLIT_ROUNDING * rounding:
        raise UserError(
            f"{SEQUENCE}: this model mixes tokens outside of the attention that can be split over ranks, so split "
            "sequences do not give the logits of full ones"
        )
    if _has_window(model.config.get_text_config()) and not sequence.saw_window:
        raise UserError(
            f"{SEQUENCE}: this model does not pass the sliding window of its config to its attention"
        )


def _random_ids(engine: Any, batch_size: int, length: int) -> Tensor:
    """Token ids (batch_size, length) on the engine's device, the same on every rank."""
    vocab_size = getattr(engine, "module", engine).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (batch_size, length), generator=generator)
    return ids.to(engine.device)


def _norm(tensor: Tensor) -> float:
    """The norm over the parts of all ranks. Collective."""
    total = tensor.double().square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())
