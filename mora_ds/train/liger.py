"""Liger's fused Triton kernels in place of a model's norms, gated activations and rotary embeddings, for --liger.

Each reads its input once and keeps less of it for backward. The linear layers between them stay ours, and so does the
loss, which reads the frozen head in chunks.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from mora_ds.common.errors import UserError
from mora_ds.engine.device import is_cpu

_NOT_THE_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check_liger(config: Any) -> None:
    """Raises `UserError` where the kernels cannot run: without a GPU, without the package, and for a type of model that
    Liger does not know, which it would leave as it is. `config`: of the model."""
    if is_cpu():
        raise UserError("--liger: Liger's kernels run on a GPU, and there is none: leave it out")
    if find_spec("liger_kernel") is None:
        raise UserError("--liger needs the package liger-kernel: pip install 'mora_ds[liger]'")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    if config.model_type not in KNOWN:
        raise UserError(f"--liger: Liger has no kernels for models of type {config.model_type}: leave it out")


def use_liger(model: Any) -> None:
    """Put the kernels into a model, whether or not it has MoRA matrices.

    Experts keep their activations, as Liger's would read the experts' weights without their matrices. A rotary
    embedding is a function of a module of transformers: it changes for every model of that type in this process.
    """
    # transformers/integrations/liger.py: what the Trainer's use_liger_kernel calls.
    from transformers.integrations.liger import apply_liger_kernel

    experts = {"swiglu": False} if any("experts" in path for path, _ in model.named_modules()) else {}
    apply_liger_kernel(model, {**_NOT_THE_LOSS, **experts})
