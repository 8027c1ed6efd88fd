"""The loss of a few tokens at a time, so that the logits of a whole batch are never there.

    chunk_loss(model)      after `deepspeed.initialize`: `losses.token_nll` then asks the model's head for losses

Logits in fp32 and their gradient take 8 bytes x tokens x vocabulary, more than all else where the vocabulary is large.
Here the head itself, wherever the model calls it, makes logits of a chunk, reduces them to losses and forgets them;
backward makes them once more (torch.utils.checkpoint): a third more arithmetic in the head. As the head stays a module
that is called once, ZeRO-3 gathers a trained one in forward and backward as ever, tied or not.

Not used: DeepSpeed's `TiledFusedLogitsLoss` (ulysses_sp.py) runs the head's backward in forward, before the loss is
scaled, so a trained head gets another gradient than the rest; torch's `linear_cross_entropy` (2.13) takes a bare
weight, which ZeRO-3 has not gathered, and knows no capped or scaled logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mora_ds.data import IGNORED
from mora_ds.errors import UserError


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


FLAG = "--chunked_loss"

CHUNK_NUMBERS = 2**24
"""Logits at once: 64 MiB of them in fp32."""

_BOUND = "_mora_chunked_head"


class ChunkedHead:
    """A model's output head that gives losses when it is asked for them, and logits otherwise."""

    def __init__(self, head: Any, finish: Callable[[Tensor], Tensor], chunk_tokens: int) -> None:
        """`finish`: what the model does to the head's output. `chunk_tokens`: logits of so many tokens at once."""
        self.chunk_tokens, self.finish, self._project = chunk_tokens, finish, head.forward
        self._labels: Tensor | None = None
        self._outputs: list[Tensor] | None = None
        head.forward = self._forward
        # after DeepSpeed's hooks, which make the output call for the weight in backward
        head.register_forward_hook(self._keep)

    def nll(self, model: Callable[..., object], batch: Mapping[str, Tensor]) -> Tensor:
        """Summed negative log-likelihood (nats, fp32) of a batch's labels, which are already shifted."""
        return self._token_losses(model, batch).sum()

    def row_nll(self, model: Callable[..., object], batch: Mapping[str, Tensor]) -> Tensor:
        """(B,): the same, row by row."""
        return self._token_losses(model, batch).sum(dim=(1, 2))

    def _token_losses(self, model: Callable[..., object], batch: Mapping[str, Tensor]) -> Tensor:
        """(B, T, 1)."""
        with self.noting() as outputs:
            self._labels = batch["labels"]
            try:
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            finally:
                self._labels = None
        return outputs[-1]

    @contextmanager
    def noting(self) -> Iterator[list[Tensor]]:
        """What the head gives meanwhile."""
        self._outputs = []
        try:
            yield self._outputs
        finally:
            self._outputs = None

    def _forward(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> logits (B, T, vocabulary), or losses (B, T, 1) while asked for them."""
        if self._labels is None:
            return self._project(hidden)
        flat, labels = hidden.flatten(0, -2), self._labels.flatten()
        parts = zip(flat.split(self.chunk_tokens), labels.split(self.chunk_tokens), strict=True)
        if torch.is_grad_enabled():
            losses = [checkpoint(self._losses_of, *part, use_reentrant=False) for part in parts]
        else:
            losses = [self._losses_of(*part) for part in parts]
        return torch.cat(losses).view(*hidden.shape[:-1], 1)

    def _losses_of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.finish(self._project(hidden.unsqueeze(0))).squeeze(0)
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")

    def _keep(self, head: nn.Module, args: object, output: Tensor) -> None:
        del head, args
        if self._outputs is not None:
            self._outputs.append(output)


def bound(model: Any) -> ChunkedHead | None:
    """What `chunk_loss` made of the head of a model, or of the one in an engine."""
    return vars(getattr(model, "module", model)).get(_BOUND)


def chunk_loss(model: Any, chunk_tokens: int | None = None) -> ChunkedHead:
    """`losses.token_nll` of this model (transformers; also through its engine) never holds whole logits from here on.

    `chunk_tokens`: default, as many as make `CHUNK_NUMBERS` logits. Raises `UserError` for a model without a head.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(head, nn.Module):
        raise UserError(f"{FLAG}: this model names no output head ({type(model).__name__})")
    chunked = ChunkedHead(head, finish_of(config), chunk_tokens or max(1, CHUNK_NUMBERS // config.vocab_size))
    vars(model)[_BOUND] = chunked
    return chunked


def finish_of(config: Any) -> Callable[[Tensor], Tensor]:
    """What a model of this config does to its head's output: scaled (Cohere, Granite), capped (Gemma 2), or nothing."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits if scale is None else logits * scale
        logits = logits if divisor is None else logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return finish
