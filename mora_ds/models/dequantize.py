"""Dequantizes published bases in FP8 and MXFP4, tensor by tensor, to a base in the run's
folder.

    FP8      NAME, NAME_scale_inv          rows x columns in e4m3; a scale for each block of weight_block_size
    MXFP4    NAME_blocks, NAME_scales      two numbers per byte, transposed; an exponent for each 32 of them

The new base has weights in the run's dtype, each rounded once; merges and exports start
from these. A record in its folder has the fingerprint of the quantized files, so that a
resumed run repeats the conversion only if they changed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mora_ds.common.errors import UserError
from mora_ds.common.files import atomic_folder, read_json, write_json_atomic
from mora_ds.common.tensor_files import dtype_name
from mora_ds.models.base import MODEL_FLAG, BaseCheckpoint
from mora_ds.models.save import Layout, write_companions, write_shards
from mora_ds.runtime.nodes import write_on_rank0
from mora_ds.runtime.ranks import Ranks

RECORD = "dequantized.json"
_SCALES = "_scale_inv"
_BLOCKS = "_blocks"
_EXPONENTS = "_scales"


def is_quantized(config: Any) -> bool:
    """Whether a model with this config has quantized weights. Raises `UserError` that
    names an unsupported quantization."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    method = settings.get("quant_method")
    if method not in ("fp8", "mxfp4"):
        raise UserError(
            f"{MODEL_FLAG}: the model has quantized weights ({method}), and only fp8 and mxfp4 are supported: give "
            "the unquantized model"
        )
    return True


def dequantized_base(
    folder: Path,
    own_base: Path,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Path:
    """Dequantize the weights of `folder` to `own_base`, in `dtype`, on rank 0. Returns
    `own_base`. Collective. Raises `UserError` for scales that are missing or do not
    fit."""
    source = ranks.agree(
        "files of the model", lambda: BaseCheckpoint.open(folder, quantized=True)
    )
    record = {"files": source.fingerprint(ranks=ranks), "dtype": dtype_name(dtype)}

    def write() -> None:
        if not (own_base / RECORD).is_file() or read_json(own_base / RECORD) != record:
            with atomic_folder(own_base) as partial:
                _write(source, partial, dtype)
                write_json_atomic(partial / RECORD, record)

    write_on_rank0(ranks, "dequantization of the base", own_base, write)
    return own_base


def _write(source: BaseCheckpoint, target: Path, dtype: torch.dtype) -> None:
    settings = read_json(source.folder / "config.json")["quantization_config"]
    block = settings.get("weight_block_size")
    layout: Layout = {}
    for key in source.keys():  # noqa: SIM118  (not a mapping)
        shape, stored = source.shape_dtype(key)
        if key.endswith(_BLOCKS):
            name = key.removesuffix(_BLOCKS)
            _require_scales(source, name + _EXPONENTS, shape[:-1], is_floating=False)
            layout[name] = ((shape[0], shape[-2] * shape[-1] * 2, shape[1]), dtype)
        elif stored is torch.float8_e4m3fn and block is not None:
            sides = zip(shape, block, strict=False)
            blocks = tuple(-(-side // size) for side, size in sides)
            _require_scales(source, key + _SCALES, blocks, is_floating=True)
            layout[key] = (shape, dtype)
        elif not key.endswith((_SCALES, _EXPONENTS)):
            if stored.itemsize == 1:
                raise UserError(
                    f"{MODEL_FLAG}: {key} is {stored} without block scales: give the unquantized model"
                )
            layout[key] = (shape, stored)

    def tensor_of(name: str, written: torch.dtype) -> Tensor:
        if name + _BLOCKS in source:
            blocks = source.read(name + _BLOCKS)
            exponents = source.read(name + _EXPONENTS)
            return convert_moe_packed_tensors(blocks, exponents, dtype=written)
        weight = source.read(name)
        if name + _SCALES in source:
            return dequantize_fp8(weight, source.read(name + _SCALES), block, written)
        return weight

    write_shards(target, layout, tensor_of)
    write_companions(source, target, dtype)
    config = read_json(target / "config.json")
    del config["quantization_config"]
    write_json_atomic(target / "config.json", config)


def _require_scales(
    source: BaseCheckpoint,
    key: str,
    shape: tuple[int, ...],
    is_floating: bool,
) -> None:
    """Raise `UserError` unless tensor `key` has one number for each block."""
    if key in source:
        actual, dtype = source.shape_dtype(key)
        if actual == shape and dtype.is_floating_point is is_floating:
            return
    raise UserError(
        f"{MODEL_FLAG}: {source.folder} has no {key} of shape {shape}, the scales of a weight's blocks"
    )


def dequantize_fp8(
    weight: Tensor,
    scales: Tensor,
    block: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize a weight (rows, columns). `scales`: (row blocks, column blocks). The
    last blocks may be smaller than `block`, which transformers 5.24 does not allow."""
    rows, columns = weight.shape
    row_scales = scales.float().repeat_interleave(block[0], dim=0)[:rows]
    full_scales = row_scales.repeat_interleave(block[1], dim=1)[:, :columns]
    return (weight.float() * full_scales).to(dtype)
