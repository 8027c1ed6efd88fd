"""Which attention a run computes with (--attention): settled before anything is loaded, and kept when it resumes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.state import AttentionKind, TrainerState
from mora_ds.common.errors import UserError
from mora_ds.config.data import Attention, ModelArguments
from mora_ds.models.attention import NAME, is_flash, why_dense

logger = logging.getLogger(__name__)


def choose_attention(model: ModelArguments, config: Any, checkpoint: Path | None = None) -> AttentionKind:
    """The attention of a run on a model of this config, which resumes from `checkpoint` where there is one.

    Raises `UserError` for --attention documents, and for a checkpoint of a run with it, where the model cannot.
    """
    before = None if checkpoint is None else TrainerState.read(checkpoint).attention
    reason = why_dense(config, model.implementation)
    if model.attention == Attention.AUTO.value:
        if before is None and reason is not None:
            logger.info(f"attention: dense, because {reason}")
        chosen = before or (AttentionKind.DOCUMENTS if reason is None else AttentionKind.DENSE)
    else:
        chosen = AttentionKind(model.attention)
    if chosen is AttentionKind.DOCUMENTS and reason is not None:
        raise UserError(f"--attention documents: not for this run, because {reason}: give --attention dense")
    if before is not None and before is not chosen:
        logger.info(
            f"attention: {chosen.value} from here on, {before.value} before; losses agree to rounding, not to the bit"
        )
    return chosen


def check_precision(model: ModelArguments, dtype: str) -> None:
    """Raises `UserError` for FlashAttention, whose kernels are for bf16 and fp16, in a run that computes in another
    dtype: transformers would find out at the first forward."""
    if model.implementation is not None and is_flash(model.implementation) and dtype not in ("bfloat16", "float16"):
        raise UserError(
            f"--attn_implementation {model.implementation}: FlashAttention computes in bf16 or fp16, and this run in "
            f"{dtype}: add --bf16 or --fp16 (or enable it in --deepspeed), or leave --attn_implementation at auto"
        )


def dense_by_choice(model: ModelArguments, config: Any) -> list[str]:
    """The given flags without which a model of this config could attend by documents."""
    given = {"--attention dense": model.attention == Attention.DENSE.value}
    given[f"--attn_implementation {model.implementation}"] = model.implementation is not None
    return [flag for flag, is_given in given.items() if is_given and why_dense(config, None) is None]


def implementation_of(model: ModelArguments, chosen: AttentionKind) -> str | None:
    """The name in transformers of the attention that runs; None for transformers' default."""
    if chosen is AttentionKind.DENSE or (model.implementation is not None and is_flash(model.implementation)):
        return model.implementation
    return NAME
