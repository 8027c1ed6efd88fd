"""An exported model compared with the live one, by logits recorded at save time.

    float32            max |difference| <= 1e-5 * max(1, max |live logit|)
    bfloat16, float16  ||difference|| / ||live logits|| <= 2 * eps * sqrt(1 + number of layers)

The live model adds the output of the current MoRA matrix to that of the merged weight;
the export has both in one weight. In fp32 the two differ by rounding of sums only. In a
16-bit dtype the export's weights (and the live model's activations) are rounded once
more, by up to eps / 2 of each number, and every layer adds independent errors of this
size to the residual stream, hence the square root. eps is the spacing of numbers at 1:
2^-7 for bfloat16, 2^-10 for float16; the coarser of the live and the exported dtype
counts. Tiny random models of 7 families, 2 to 36 layers deep, reached 0.2 to 0.6 of
this tolerance; logits cannot distinguish a smaller update from rounding.

A run with --base_bits 8 or 4 (`ops.int8`, `adapters.nf4`) rounded its frozen weights,
and the export does not: the loaded export is given the same rounding, and then has to
agree as one of a dense base.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.tensor_files import compute_dtype, open_safetensors

FP32_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Comparison:
    """Logits of an export compared with the live model's."""

    error: float
    """What `tolerance` bounds: the largest difference (fp32), or the relative norm of
    all (16-bit)."""
    tolerance: float

    def line(self) -> str:
        return f"logits against the live model's: error {self.error:.3e}, tolerance {self.tolerance:.3e}"


def compare_logits(
    folder: Path,
    probe: Path,
    dtype: torch.dtype,
    name: str = "logits",
    change: Callable[[Any], None] | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Load the export in `folder` on the CPU, and compare its logits with those in
    `probe`.

    `probe`, `name`: as of `read_probe`. `change`: makes a loaded export what the live
    model was. `trust_remote_code`: run code that comes with it. Raises `RunError` when
    the difference exceeds the tolerance or the export lacks weights; `UserError` for a
    damaged probe.
    """
    from transformers import AutoModelForCausalLM

    tokens, live, recorded = read_probe(probe, name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        use_kernels=False,
    )
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        raise RunError(
            f"the export lacks weights: {info['missing_keys']} {info['mismatched_keys']}"
        )
    model.eval()
    if change is not None:
        change(model)
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    if logits.shape != live.shape:
        raise RunError(
            f"the export gives logits of shape {tuple(logits.shape)}, recorded were {tuple(live.shape)}"
        )
    coarser = max((dtype, recorded), key=lambda candidate: torch.finfo(candidate).eps)
    comparison = compare(
        live, logits, coarser, model.config.get_text_config().num_hidden_layers
    )
    if not comparison.error <= comparison.tolerance:  # NaN must fail
        raise RunError(f"the export does not match: {comparison.line()}")
    return comparison


def read_probe(path: Path, name: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """(tokens (B, T) int64, logits (B, T, V) in fp32, the live model's dtype) of a
    safetensors file with "input_ids", logits called `name`, and "dtype" in its
    metadata. Raises `UserError` for a damaged one."""
    handle = open_safetensors(path)
    if missing := {name, "input_ids"} - set(handle.keys()):
        raise UserError(f"{path} holds no {min(missing)}")
    live = handle.get_tensor(name).float()
    tokens = handle.get_tensor("input_ids")
    if (
        tokens.dim() != 2
        or tokens.dtype != torch.int64
        or live.shape[:-1] != tokens.shape
    ):
        raise UserError(
            f"{path} holds tokens of shape {tuple(tokens.shape)}, logits of {tuple(live.shape)}"
        )
    return (
        tokens,
        live,
        compute_dtype((handle.metadata() or {}).get("dtype", "float32")),
    )


def compare(
    live: Tensor, logits: Tensor, dtype: torch.dtype, layers: int
) -> Comparison:
    difference = logits - live
    if dtype is torch.float32:
        largest = difference.abs().max().item()
        return Comparison(largest, FP32_TOLERANCE * max(1.0, live.abs().max().item()))
    relative = (difference.norm() / live.norm()).item()
    return Comparison(relative, 2 * torch.finfo(dtype).eps * math.sqrt(1 + layers))
