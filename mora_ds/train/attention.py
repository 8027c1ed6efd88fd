"""Which attention a run computes with. It follows from the settings and the model's config, so that a resume finds the
same."""

from typing import Any

from mora_ds.common.errors import UserError
from mora_ds.config.data import ModelArguments
from mora_ds.engine.device import is_cpu
from mora_ds.models.attention import NAME, is_flash, why_dense

FLEX = "flex_attention"
"""transformers' name of it."""


def implementation_of(model: ModelArguments, config: Any) -> str | None:
    """The name in transformers of the attention of a run on a model of this config; None for transformers' default."""
    if model.implementation is None and why_dense(config, None) is None:
        return NAME
    return model.implementation


def check_precision(model: ModelArguments, dtype: str) -> None:
    """Raises `UserError` for FlashAttention, whose kernels are for bf16 and fp16, in a run that computes in another
    dtype: transformers would find out at the first forward."""
    if model.implementation is not None and is_flash(model.implementation) and dtype not in ("bfloat16", "float16"):
        raise UserError(
            f"--attn_implementation {model.implementation}: FlashAttention computes in bf16 or fp16, and this run in "
            f"{dtype}: add --bf16 or --fp16 (or enable it in --deepspeed), or leave --attn_implementation at auto"
        )


def check_device(model: ModelArguments) -> None:
    """Raises `UserError` for FlexAttention on a CPU, where torch has no backward pass of it: it would find out at the
    first step, after compiling."""
    if model.implementation == FLEX and is_cpu():
        raise UserError(
            f"--attn_implementation {FLEX} trains on a GPU alone: leave --attn_implementation at auto, which attends "
            "document by document, too"
        )
