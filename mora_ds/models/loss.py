"""The loss of a batch, optionally in chunks of tokens, so that the logits of a full batch
are never in memory.

    chunk_loss(model)      call after injecting adapters: `token_nll` then computes the loss inside the model's head

fp32 logits and their gradient take 8 bytes x tokens x vocabulary, which dominates memory
for a large vocabulary. With `chunk_loss` the head computes the logits of one chunk at a
time and reduces them:

    frozen head      to losses and their gradients by the head's input; backward only scales these. No additional
                     arithmetic, and the head's weight is not read again
    trained head     to losses; backward recomputes the logits (torch.utils.checkpoint): a third more arithmetic

The head is still a module that is called once, so ZeRO-3 all-gathers a trained head in
forward and backward as usual, tied or not.

Alternatives that were not used: DeepSpeed's `TiledFusedLogitsLoss` (ulysses_sp.py) runs
the head's backward in forward, before the loss is scaled, so a trained head would get a
wrong gradient; torch's `linear_cross_entropy` (2.13) takes a weight, which ZeRO-3 has
not gathered, and does not support capped or scaled logits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mora_ds.common.attributes import replaced
from mora_ds.common.errors import UserError
from mora_ds.data import IGNORED
from mora_ds.data.documents import Batch
from mora_ds.models.attention import model_inputs

FLAG = "--chunked_loss"

CHUNK_LOGITS = 2**24
"""Number of logits in a chunk on a CPU: 64 MiB in fp32."""

GPU_CHUNK_LOGITS = 2**27
"""Number of logits in a chunk on a GPU: 512 MiB in fp32; smaller chunks would not
utilize it."""

_CPU_TOKENS = 256
"""Maximum number of tokens that a frozen head on a CPU computes at once: enough for
efficient products, and the logits stay in cache."""

_ATTRIBUTE = "_mora_chunked_head"


def perplexity(loss: float) -> float:
    """exp(loss); infinity on overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def token_nll(model: Callable[..., object], batch: Batch) -> Tensor:
    """(): summed negative log-likelihood (nats, fp32) of a batch's labels.

    Labels are already shifted: labels[t] is the token after input_ids[t], or IGNORED.
    Restarting `position_ids`, and the `documents` derived from them, keep attention
    inside each document. Computed in chunks after `chunk_loss`.
    """
    if (chunked := chunked_head_of(model)) is not None:
        return chunked.token_losses(model, batch).sum()
    return _cross_entropy(model, batch, "sum")


def sequence_nll(model: Callable[..., object], batch: Batch) -> Tensor:
    """(B,): `token_nll` of each sequence."""
    if (chunked := chunked_head_of(model)) is not None:
        return chunked.token_losses(model, batch).sum(dim=(1, 2))
    return _cross_entropy(model, batch, "none").view(batch["labels"].shape).sum(dim=-1)


def _cross_entropy(
    model: Callable[..., object],
    batch: Batch,
    reduction: str,
) -> Tensor:
    logits = model(**model_inputs(model, batch)).logits  # type: ignore[attr-defined]
    logits = logits.flatten(0, -2).float()
    labels = batch["labels"].flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction=reduction)


class ChunkedHead:
    """Patches a model's output head: it returns losses inside `token_losses`, and logits
    otherwise."""

    def __init__(
        self,
        head: Any,
        finish: Callable[[Tensor], Tensor],
        chunk_tokens: int,
    ) -> None:
        """`finish`: the function that the model applies to the head's output."""
        self.chunk_tokens = chunk_tokens
        self.finish = finish
        self._head = head
        self._project = head.forward
        self._labels: Tensor | None = None
        self._outputs: list[Tensor] | None = None
        head.forward = self._forward
        # Runs after DeepSpeed's hooks, which make the output gather the weight in
        # backward
        self._hook = head.register_forward_hook(self._record)

    def remove(self) -> None:
        """Restore the original head."""
        self._head.forward = self._project
        self._hook.remove()

    def token_losses(self, model: Callable[..., object], batch: Batch) -> Tensor:
        """(B, T, 1): the negative log-likelihood of each label; 0 for IGNORED."""
        with self.recording() as outputs, replaced(self, "_labels", batch["labels"]):
            model(**model_inputs(model, batch))
        return outputs[-1]

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """A context that appends the outputs of the head to a list, and yields the
        list."""
        outputs: list[Tensor] = []
        with replaced(self, "_outputs", outputs):
            yield outputs

    def _forward(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> logits (B, T, vocabulary), or losses (B, T, 1) if labels are
        set."""
        if self._labels is None:
            return self._project(hidden)
        flat = hidden.flatten(0, -2)
        labels = self._labels.flatten()
        is_trained = not is_frozen(self._head)
        if torch.is_grad_enabled() and hidden.requires_grad and not is_trained:
            losses = _FrozenHeadLosses.apply(flat, labels, self)
        else:
            losses_of: Callable[..., Tensor] = self._losses_of
            if torch.is_grad_enabled() and is_trained:
                losses_of = partial(checkpoint, self._losses_of, use_reentrant=False)
            losses = torch.cat(
                [losses_of(*chunk) for chunk in self._chunks(flat, labels)]
            )
        return losses.view(*hidden.shape[:-1], 1)

    def _chunks(
        self, hidden: Tensor, labels: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        count = self.chunk_tokens
        return zip(hidden.split(count), labels.split(count), strict=True)

    def _losses_of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self._logits(hidden).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")

    @torch.enable_grad()
    def _loss_and_gradient(
        self, hidden: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(N, d) and labels (N,) -> the losses (N,) in fp32 and their gradients
        (N, d)."""
        hidden = hidden.detach().requires_grad_()
        logits = self._logits(hidden)
        values = torch.log_softmax(logits.detach(), dim=-1, dtype=torch.float32)
        counts = (labels != IGNORED).unsqueeze(-1)
        label = labels.clamp(min=0).unsqueeze(-1)
        losses = torch.where(counts, -values.gather(-1, label), 0.0).squeeze(-1)
        # The gradient of a loss by its logits: the probabilities, minus 1 at the label
        minus_1 = values.new_full(label.shape, -1.0)
        values.exp_().scatter_add_(-1, label, minus_1).mul_(counts)
        (gradient,) = torch.autograd.grad(logits, hidden, values.to(logits.dtype))
        return losses, gradient

    def _logits(self, hidden: Tensor) -> Tensor:
        """(N, d) -> (N, vocabulary)"""
        return self.finish(self._project(hidden.unsqueeze(0))).squeeze(0)

    def _record(self, head: nn.Module, args: object, output: Tensor) -> None:
        if self._outputs is not None:
            self._outputs.append(output)


class _FrozenHeadLosses(torch.autograd.Function):
    """Losses of tokens through a frozen head, with gradients computed in forward.

    A token's loss depends only on its row of the head's input, so backward multiplies
    each row of the gradient with the loss's upstream gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: ChunkedHead) -> Tensor:
        results: list[tuple[Tensor, Tensor]] = []
        for inputs, targets in head._chunks(hidden, labels):
            # Parts of equal size, because products with few tokens round differently
            # from those with many
            on_cpu = inputs.device.type == "cpu"
            count = max(1, math.ceil(len(inputs) / _CPU_TOKENS)) if on_cpu else 1
            results += map(
                head._loss_and_gradient,
                inputs.tensor_split(count),
                targets.tensor_split(count),
            )
        losses, gradients = zip(*results, strict=True)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * upstream.unsqueeze(-1)).to(gradients.dtype), None, None


def is_frozen(head: Any) -> bool:
    """Whether the head is a module without trainable parameters."""
    return isinstance(head, nn.Module) and not any(
        parameter.requires_grad for parameter in head.parameters()
    )


def chunked_head_of(model: Any) -> ChunkedHead | None:
    """The `ChunkedHead` of a model or an engine; None without `chunk_loss`."""
    return vars(getattr(model, "module", model)).get(_ATTRIBUTE)


def chunk_loss(model: Any, chunk_tokens: int | None = None) -> ChunkedHead:
    """Make `token_nll` and `sequence_nll` of a transformers model, also through its
    engine, compute in chunks. Always better for a frozen head (`is_frozen`); for a
    trained head it takes less memory, but more arithmetic.

    `chunk_tokens`: by default for `CHUNK_LOGITS` logits, on a GPU `GPU_CHUNK_LOGITS`.
    Raises `UserError` for a model without a head.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    if not isinstance(head, nn.Module):
        raise UserError(
            f"{FLAG}: this model has no output head ({type(model).__name__})"
        )
    tensors = (*head.parameters(), *head.buffers())
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    chunk_logits = CHUNK_LOGITS if on_cpu else GPU_CHUNK_LOGITS
    chunk_tokens = chunk_tokens or max(1, chunk_logits // config.vocab_size)
    chunked = ChunkedHead(head, finish_of(config), chunk_tokens)
    vars(model)[_ATTRIBUTE] = chunked
    return chunked


def unchunked_loss(model: Any) -> None:
    """Undo `chunk_loss`."""
    vars(model).pop(_ATTRIBUTE).remove()


def finish_of(config: Any) -> Callable[[Tensor], Tensor]:
    """The function that a model of this config applies to its head's output: scaling
    (Cohere, Granite), capping (Gemma 2), or none."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: Tensor) -> Tensor:
        logits = logits if scale is None else logits * scale
        logits = logits if divisor is None else logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return finish
