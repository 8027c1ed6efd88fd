"""The singular vectors that the subspace operator reads, or a hook of the run: on every process the same bits.

    nobody reads any                             nothing is done
    a new run                                    rank 0 decomposes the base into OUTPUT_DIR/subspace, once; the merge
                                                 ledger takes a hard link, and with it every checkpoint and adapter
    a resumed run                                the file of the checkpoint's ledger is used

A training loop written by a user calls `run.with_vectors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.layer import ExpertStack, linear_shape
from mora_ds.adapters.ops.singular_vectors import register
from mora_ds.adapters.target_modules import targets_of
from mora_ds.checkpoint.layout import LEDGER_FOLDER
from mora_ds.common.errors import UserError
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.svd import Wanted, cache_key, record_of, write_vectors
from mora_ds.remora.ledger import Ledger
from mora_ds.runtime.ranks import Ranks

FOLDER = "subspace"


def wanted_vectors(
    model: nn.Module, config: MoRAConfig, keys: Mapping[str, str], leading: int = 0
) -> dict[str, Wanted]:
    """Module -> what to decompose, before injection: as many singular vectors as the operator reads, and at least
    `leading`. Raises `UserError` for experts, and for a layer that has fewer than `leading`."""
    wanted = {}
    for name, module in targets_of(model, config).items():
        if isinstance(module, ExpertStack):
            raise UserError(f"--target_modules includes {name}, experts, whose singular vectors are not computed")
        d_in, d_out = linear_shape(module)
        if leading > min(d_in, d_out):
            raise UserError(f"{name} is {d_out} x {d_in}: it has fewer than {leading} singular vectors")
        for_operator = config.size_of(name, d_in, d_out) if config.is_subspace else 0
        count = max(min(for_operator, d_in, d_out), leading)
        wanted[name] = Wanted(keys[f"{name}.weight"], isinstance(module, Conv1D), d_in, d_out, count)
    return wanted


def prepare_vectors(
    config: MoRAConfig,
    wanted: Mapping[str, Wanted],
    base: BaseCheckpoint,
    folder: Path,
    ranks: Ranks,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
) -> MoRAConfig:
    """The config with the name of the vectors, whose file is then known to this process. Collective.

    `folder`: the run's. For a `checkpoint` without vectors, which is
    another run's, the config returns without a name, and the comparison of identities refuses it.
    """
    if checkpoint is not None:
        if not (ledger := checkpoint / LEDGER_FOLDER).is_dir():
            return config
        vectors = ranks.agree("singular vectors of the checkpoint", lambda: Ledger.open(ledger, hashes=False)).vectors
        return replace(config, vectors="" if vectors is None else vectors.name)

    def write() -> str:
        path = folder / FOLDER / f"{cache_key(base.fingerprint(), wanted)}.safetensors"
        if not path.is_file():
            write_vectors(path, base, wanted, device)
        return path.name

    path = folder / FOLDER / ranks.on_first("singular vectors", write, long=True)
    name = ranks.on_first("record of the singular vectors", lambda: record_of(path).name)
    register(name, path)
    return replace(config, vectors=name)
