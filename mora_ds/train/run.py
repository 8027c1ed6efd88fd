"""One MoRA run around an engine: merge, save, resume. The trainer's, and that of a loop of the user's own.

run = Run(engine, config, base="path/of/the/model", folder="out")      resume="auto" continues what is there
run.merge(step)        at intervals: ReMoRA
run.save(step)         out/checkpoints/step-N, from which export_merged makes a model
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.domains import frozen_values, restore_frozen
from mora_ds.adapters.inject import base_weights, mora_layers, value_names
from mora_ds.adapters.new_embeddings import stands_for
from mora_ds.adapters.ops.singular_vectors import path_of
from mora_ds.adapters.target_modules import targets_of
from mora_ds.checkpoint.adapter_files import AdapterTensors, BaseReference, read_adapter
from mora_ds.checkpoint.contents import PROBE_TOKENS, RunWriter
from mora_ds.checkpoint.folder import resume_checkpoint
from mora_ds.checkpoint.layout import CHECKPOINTS, LEDGER_FOLDER, complete_checkpoints
from mora_ds.checkpoint.state import TrainerState, check_identity
from mora_ds.checkpoint.writer import CheckpointWriter, load_checkpoint
from mora_ds.engine import zero
from mora_ds.engine.initialize import start_distributed
from mora_ds.errors import UserError
from mora_ds.models.base import BaseCheckpoint, NotOneToOne, renamed_keys, verify_against_model
from mora_ds.models.tensor_files import dtype_name
from mora_ds.remora.ledger import LEDGER_FILE, Ledger
from mora_ds.remora.merge import EXACT, MergeReport, ReMoRA
from mora_ds.remora.optimizer_reset import OptimizerReset
from mora_ds.runtime.nodes import Followers
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.vectors import prepare_vectors, wanted_vectors


class Run:
    """The ledger and the checkpoints of one engine, in `folder`. Make it, and call its methods, on all ranks.

    `base` is the Hugging Face folder that the model was loaded from: it is reread at every merge and never written.
    With `resume` ("auto", "latest", a path) engine, ledger and live base are as that checkpoint has them, and `state`
    says where it stands; without, the folder must hold no other run, or `overwrite` its ledger.
    Raises `UserError` when the model does not hold that base, weight for weight, or the checkpoint is another run's.
    """

    def __init__(
        self,
        engine: zero.Engine,
        config: AdapterConfig,
        base: Path | str | BaseCheckpoint,
        folder: Path | str,
        *,
        resume: Path | str | None = None,
        overwrite: bool = False,
        keys: Mapping[str, str] | None = None,
        precision: str = EXACT,
        reset: OptimizerReset = OptimizerReset.ZERO,
        identity: Mapping[str, Any] | None = None,
        tokenizer_folder: Path | None = None,
        probe_ids: Tensor | None = None,
        facts: Mapping[str, Any] | None = None,
        async_save: bool = False,
        followers: Followers | None = None,
    ) -> None:
        """`keys` maps parameter names to the base's keys where the caller has them already; `identity` is what a
        resumed run must agree on beside base and adapter; a `resume` that is a `Path` is one that was verified;
        `probe_ids` (1, T) are recorded with their logits; with `async_save`, `save` writes in the background;
        `followers` where they have been found already."""
        self.engine, self.ranks = engine, Ranks.current()
        self.followers = self._find_followers(Path(folder)) if followers is None else followers
        self.folder = self.followers.folder
        opened = base if isinstance(base, BaseCheckpoint) else BaseCheckpoint.open(base, "base")
        as_loaded = keys is None
        keys = self._map(opened) if keys is None else dict(keys)
        fingerprint = self.ranks.on_first(opened.fingerprint)
        self.identity = run_identity(fingerprint, config, precision, identity)
        self._vectors = config.vectors if isinstance(config, MoRAConfig) else ""
        checkpoint = self._checkpoint(resume, overwrite)
        ledger = self._open_ledger(checkpoint, fingerprint)
        self.remora = ReMoRA(engine, config, ledger, opened, keys, precision, self.ranks.is_local_first, reset)
        dtype = dtype_name(next(iter(mora_layers(engine.module).values())).dtype)
        self._writer = RunWriter(
            engine,
            config,
            self.remora,
            BaseReference(str(opened.folder.resolve()), fingerprint, keys, dtype),
            tokenizer_folder,
            torch.arange(3, 3 + PROBE_TOKENS).unsqueeze(0) if probe_ids is None else probe_ids,
            {"operator": config.title, "merge_precision": precision, **(facts or {})},
        )
        self._checkpoints = CheckpointWriter(
            self.folder / CHECKPOINTS, engine, self._writer.collect, async_save, self.followers
        )
        self.state = TrainerState(world_size=self.ranks.world, identity=self.identity)
        if checkpoint is not None:
            self.state = load_checkpoint(checkpoint, engine, self.identity)
            if frozen_values(engine.module):
                tensors = AdapterTensors.open(checkpoint, read_adapter(checkpoint))
                restore_frozen(engine.module, dict(tensors.items()))
            self.remora.replay()
        if as_loaded and config.base_bits == 8 and not self.remora.cycle:
            self.remora.form_base()  # of the originals: the model may have been loaded in another dtype than theirs

    def merge(self, step: int) -> MergeReport:
        """Merge all squares after optimizer step `step` and start the next cycle."""
        report = self.remora.merge(step)
        self.state.merges.append(step)
        return report

    def save(self, step: int, keep: int | None = None) -> Path:
        """Checkpoint `step`; the newest `keep` stay. Returns its folder, which with `async_save` comes later."""
        self.state.step = step
        return self.save_state(self.state, keep)

    def save_state(self, state: TrainerState, keep: int | None = None) -> Path:
        """The same with everything that a trainer knows of where it stands."""
        return self._checkpoints.save(state, keep)

    def wait(self, timeout_s: float | None = None) -> None:
        """With `async_save`: until the last checkpoint is written. Call it before the process ends."""
        self._checkpoints.wait(timeout_s)

    def _find_followers(self, folder: Path) -> Followers:
        self.ranks.on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
        return Followers.find(folder, self.ranks)

    def _checkpoint(self, resume: Path | str | None, overwrite: bool) -> Path | None:
        root = self.folder / CHECKPOINTS
        if resume is None:
            held = (self.folder / LEDGER_FOLDER / LEDGER_FILE).exists() or bool(complete_checkpoints(root))
            if self.ranks.on_first(lambda: held) and not overwrite:
                raise UserError(f'{self.folder} holds another run: choose another folder, or resume="auto"')
            return None
        if isinstance(resume, Path):  # pretrain has verified it, and this rank can read it
            found: Path | None = resume
        elif (found := self.ranks.on_first(lambda: resume_checkpoint(str(resume), root))) is not None:
            found = self.followers.fetch(found)
        if found is not None:
            check_identity(found, TrainerState.read(found).identity, self.identity)
        return found

    def _open_ledger(self, checkpoint: Path | None, fingerprint: str) -> Ledger:
        """That of the checkpoint, or an empty one. What a run without a checkpoint has left goes.

        Node by node: where they share the folder, two would write the same files at once. Followers have their own.
        """
        folder = self.folder / LEDGER_FOLDER
        for turn in range(self.ranks.world):
            if self.ranks.rank == turn and self.ranks.is_local_first:
                if checkpoint is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    Ledger.create(folder, fingerprint, path_of(self._vectors) if self._vectors else None)
                else:
                    Ledger.open(checkpoint / LEDGER_FOLDER, fingerprint).copy_to(folder)
            self.ranks.barrier()
        return Ledger.open(folder, fingerprint)

    def _map(self, base: BaseCheckpoint) -> dict[str, str]:
        """Keys of every parameter the model was loaded with; the frozen ones are compared bit for bit."""
        model: Any = self.engine.module
        frozen = base_weights(model)
        squares = value_names(model)
        names = [*frozen, *(stands_for(name) for name, _ in model.named_parameters() if name not in squares)]
        ties = dict(getattr(model, "all_tied_weights_keys", {}) or {})
        keys = base.map_parameters(names, model.base_model_prefix, ties, renamed_keys(model, base.keys()))
        whole = {name: tensor for name, tensor in frozen.items() if tensor.dtype is not torch.int8}
        self.ranks.on_first(lambda: verify_against_model(base, keys, whole, whole))
        self.ranks.on_first(lambda: _verify_8_bits(base, keys, model))
        return keys


def _verify_8_bits(base: BaseCheckpoint, keys: Mapping[str, str], model: Any) -> None:
    """Every weight in 8 bits is its original to within its rounding, and that of any dtype it was loaded in. Raises
    `NotOneToOne` naming the first that is not."""
    for name, layer in mora_layers(model).items():
        if layer.weight_scales is None:
            continue
        key = keys[f"{name}.weight"]
        original = base.read(key).to(layer.weight.device, torch.float32)
        step = layer.weight_scales.max().item()
        if original.shape != layer.weight.shape or not torch.allclose(layer.read(), original, rtol=2**-8, atol=step):
            raise NotOneToOne(f"{name}.weight of the model is not, in 8 bits, the tensor {key!r} of {base.folder}")


def run_identity(
    fingerprint: str, config: AdapterConfig, precision: str, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must have in common."""
    return {
        "base": fingerprint,
        "adapter": config.to_dict(),
        "merge_precision": precision,
        **(more or {}),
    }


def with_vectors(
    config: MoRAConfig, model: Any, base: Path | str, folder: Path | str, alignment_rank: int = 0
) -> MoRAConfig:
    """The config that names the base's singular vectors, which the subspace operator and the alignment loss read: call
    it before `inject`, on all ranks.

    `model`: a transformers model as it was loaded from the folder `base`. Rank 0 decomposes that once; the file lies in
    `folder`, that of the `Run` to come, which all ranks must see. Raises `UserError` for a base that cannot be opened
    and an `alignment_rank` beyond a layer's shorter side.
    """
    start_distributed()
    opened = BaseCheckpoint.open(base, "base")
    names = [f"{name}.weight" for name in targets_of(model, config)]
    ties = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    keys = opened.map_parameters(names, model.base_model_prefix, ties, renamed_keys(model, opened.keys()))
    wanted = wanted_vectors(model, config, keys, alignment_rank)
    return prepare_vectors(config, wanted, opened, Path(folder), Ranks.current(), lambda path: None)
