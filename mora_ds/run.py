"""One MoRA run around an engine: merge, save, resume. The trainer's, and that of a loop of the user's own.

    run = Run(engine, config, base="path/of/the/model", folder="out")
    run.merge(step)        at intervals: ReMoRA
    run.save(step)         out/checkpoints/step-N, from which export_merged makes a model
    run.resume()           engine, ledger and live base as the newest whole checkpoint has them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds import zero
from mora_ds.adapter_files import BaseReference
from mora_ds.base import BaseCheckpoint, renamed_keys, verify_against_model
from mora_ds.checkpoint import AUTO, TrainerState, find_checkpoint, load_checkpoint, save_checkpoint
from mora_ds.config import MoRAConfig
from mora_ds.errors import UserError
from mora_ds.injection import frozen_buffers, mora_layers
from mora_ds.ledger import Ledger
from mora_ds.ranks import Ranks
from mora_ds.remora import EXACT, MergeReport, ReMoRA
from mora_ds.saving import PROBE_TOKENS, RunWriter
from mora_ds.tensor_files import dtype_name


class Run:
    """The ledger and the checkpoints of one engine, in `folder`. Make it, and call its methods, on all ranks.

    `base` is the Hugging Face folder that the model was loaded from; it is reread at every merge and never written.
    Raises `UserError` when the model does not hold that base, weight for weight.
    """

    def __init__(
        self,
        engine: zero.Engine,
        config: MoRAConfig,
        base: Path | str | BaseCheckpoint,
        folder: Path | str,
        *,
        keys: Mapping[str, str] | None = None,
        precision: str = EXACT,
        identity: Mapping[str, Any] | None = None,
        tokenizer_folder: Path | None = None,
        probe_ids: Tensor | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """`keys` maps parameter names to the base's keys where the caller has them already; `identity` is what a
        resumed run must agree on beside base and adapter; `probe_ids` (1, T) are recorded with their logits."""
        self.engine, self.folder, self.ranks = engine, Path(folder), Ranks.current()
        opened = base if isinstance(base, BaseCheckpoint) else BaseCheckpoint.open(base, "base")
        keys = dict(keys) if keys is not None else self._map(opened)
        fingerprint = self.ranks.on_first(opened.fingerprint)
        self.remora = ReMoRA(
            engine, config, self._ledger(fingerprint), opened, keys, precision, self.ranks.is_local_first
        )
        self.identity = {
            "base": fingerprint,
            "adapter": config.to_dict(),
            "merge_precision": precision,
            **(identity or {}),
        }
        dtype = dtype_name(next(iter(mora_layers(engine.module).values())).weight.dtype)
        self._writer = RunWriter(
            engine,
            config,
            self.remora,
            BaseReference(str(opened.folder.resolve()), fingerprint, keys, dtype),
            tokenizer_folder,
            torch.arange(3, 3 + PROBE_TOKENS).unsqueeze(0) if probe_ids is None else probe_ids,
            {"operator": config.kind.value, "merge_precision": precision, **(facts or {})},
        )
        self._merges: list[int] = []

    def merge(self, step: int) -> MergeReport:
        """Merge all squares after optimizer step `step` and start the next cycle."""
        report = self.remora.merge(step)
        self._merges.append(step)
        return report

    def save(self, step: int, keep: int | None = None) -> Path:
        """Checkpoint `step`; the newest `keep` stay. Returns its folder."""
        return self.save_state(TrainerState(step=step, merges=self._merges), keep)

    def save_state(self, state: TrainerState, keep: int | None = None) -> Path:
        """The same with everything that a trainer knows of where it stands."""
        state.world_size, state.identity = dist.get_world_size(), self.identity
        return save_checkpoint(
            self.folder / "checkpoints", self.engine, state, lambda target: self._writer.write(target, state.step), keep
        )

    def resume(self, checkpoint: Path | str = AUTO) -> TrainerState | None:
        """Back to a checkpoint: "auto" (the newest whole one, None if there is none), "latest", or a path."""
        root = self.folder / "checkpoints"
        found = self.ranks.on_first(lambda: find_checkpoint(str(checkpoint), root, print))
        if found is None:
            return None
        state = load_checkpoint(found, self.engine, self.identity)
        if self.ranks.is_local_first:
            kept = self.remora.ledger
            Ledger.open(found / "ledger", kept.base_fingerprint).copy_to(kept.folder)
        self.ranks.barrier()
        self.remora.reopen()
        self.remora.replay()
        self._merges = list(state.merges)
        return state

    def start_afresh(self) -> None:
        """Forget the cycles that an earlier run left in this folder's ledger."""
        if self.ranks.is_local_first:
            self.remora.ledger.truncate(0)
        self.ranks.barrier()
        self.remora.reopen()

    def _ledger(self, fingerprint: str) -> Ledger:
        folder = self.folder / "ledger"
        if self.ranks.is_local_first and not (folder / "ledger.json").exists():
            Ledger.create(folder, fingerprint)
        self.ranks.barrier()
        return Ledger.open(folder, fingerprint)

    def _map(self, base: BaseCheckpoint) -> dict[str, str]:
        """Keys of every parameter the model was loaded with; the frozen ones are compared bit for bit."""
        model: Any = self.engine.module
        frozen = frozen_buffers(model)
        squares = {f"{name}.square" for name in mora_layers(model)}
        names = [*frozen, *(name for name, _ in model.named_parameters() if name not in squares)]
        ties = dict(getattr(model, "all_tied_weights_keys", {}) or {})
        prefix = getattr(model, "base_model_prefix", "")
        renamed = renamed_keys(model, base.keys()) if hasattr(model, "config") else {}
        keys = base.map_parameters(names, prefix, ties, renamed)
        self.ranks.on_first(lambda: verify_against_model(base, keys, frozen, frozen))
        if not frozen:
            raise UserError("the model has no frozen base")
        return keys
