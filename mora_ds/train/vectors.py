"""The singular vectors that a run needs, there before its squares are: on every rank the same bits.

    no subspace operator, no alignment loss      nothing
    a run that begins                            rank 0 decomposes the base into OUTPUT_DIR/subspace, once; the ledger
                                                 takes a link, and with it every checkpoint and portable adapter
    one that resumes                             those of the checkpoint's ledger
    nodes that do not see the folder             get the file

In a loop of one's own: `run.with_vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.layer import linear_shape
from mora_ds.adapters.ops.singular_vectors import register
from mora_ds.adapters.target_modules import targets_of
from mora_ds.checkpoint.layout import LEDGER_FOLDER
from mora_ds.errors import UserError
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.svd import Wanted, cache_key, record_of, write_vectors
from mora_ds.remora.ledger import Ledger
from mora_ds.runtime.ranks import Ranks

FOLDER = "subspace"

Send = Callable[[Path], None]
"""Gives a folder of rank 0's to nodes that do not see it (`followers.Followers.share`)."""


def needs_vectors(config: MoRAConfig, alignment_rank: int = 0) -> bool:
    return config.is_subspace or alignment_rank > 0


def wanted_vectors(
    model: nn.Module, config: MoRAConfig, keys: Mapping[str, str], alignment_rank: int = 0
) -> dict[str, Wanted]:
    """Module -> what to decompose, before injection. Raises `UserError` for an `alignment_rank` beyond a side."""
    check_alignment_rank(model, config, alignment_rank)
    wanted = {}
    for name, module in targets_of(model, config).items():
        d_in, d_out = linear_shape(module)
        own = config.size_of(name, d_in, d_out) * config.vector_sets if config.is_subspace else 0
        count = max(min(own, d_in, d_out), alignment_rank)
        wanted[name] = Wanted(keys[f"{name}.weight"], isinstance(module, Conv1D), d_in, d_out, count)
    return wanted


def check_alignment_rank(model: nn.Module, config: MoRAConfig, alignment_rank: int) -> None:
    """Before injection; a planned model will do. Raises `UserError` naming a layer that has fewer vectors."""
    for name, module in targets_of(model, config).items():
        d_in, d_out = linear_shape(module)
        if alignment_rank > min(d_in, d_out):
            raise UserError(
                f"--alignment_rank {alignment_rank}: {name} is {d_out} x {d_in}, so it has {min(d_in, d_out)} singular "
                "vectors: take fewer, or leave it out of --target_modules"
            )


def prepare_vectors(
    config: MoRAConfig,
    wanted: Mapping[str, Wanted],
    base: BaseCheckpoint,
    folder: Path,
    ranks: Ranks,
    send: Send,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
) -> MoRAConfig:
    """The config that names them, with the file known to this process. Collective.

    `folder`: of the run; a rank on a node that does not see rank 0's has one of its own. A `checkpoint` without vectors
    is another run's: the config comes back without a name, and the run is told apart by that.
    """
    if checkpoint is not None and not (checkpoint / LEDGER_FOLDER).is_dir():
        return config
    if checkpoint is not None:
        held = ranks.agree(lambda: Ledger.open(checkpoint / LEDGER_FOLDER, hashes=False)).vectors
        return replace(config, vectors="" if held is None else held.name)

    def work() -> str:
        path = folder / FOLDER / f"{cache_key(base.fingerprint(), wanted)}.safetensors"
        if not path.is_file():
            write_vectors(path, base, wanted, device)
        return path.name

    name = ranks.on_first(work)
    send(folder / FOLDER)
    path = folder / FOLDER / name
    called = ranks.on_first(lambda: record_of(path).name)
    register(called, path)
    return replace(config, vectors=called)
