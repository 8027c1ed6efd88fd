"""A run around an engine: resume, merge, save, export.

    run = Run(engine, base="path/of/the/model", folder="out")      resume="auto" continues what is there
    run.merge(step)        at intervals: ReMoRA
    run.save(step)         out/checkpoints/step-N, from which export_merged makes a model

The main job, Hugging Face's Trainer and loops of users call the same methods.
`TrainingRun` is what remains where every parameter is trained, without base and merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.adapters.config import AS_LOADED
from mora_ds.adapters.domain_names import SHARED
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.inject import base_weights, config_of, frozen_buffers
from mora_ds.adapters.layer import AdaptedLinear, adapter_parameter_names, mora_layers
from mora_ds.adapters.new_embeddings import stands_for
from mora_ds.adapters.ops.frozen import QuantizedWeight
from mora_ds.adapters.quantized import quantized_layers
from mora_ds.checkpoint.adapter_files import BaseReference, logits_name
from mora_ds.checkpoint.layout import CHECKPOINTS, LEDGER_FOLDER
from mora_ds.checkpoint.manager import (
    CheckpointManager,
    complete_checkpoints,
    resume_checkpoint,
)
from mora_ds.checkpoint.sections import (
    AdapterSection,
    Section,
    adapter_sections,
    scheduler_state,
)
from mora_ds.checkpoint.state import TrainerState, check_identity, run_identity
from mora_ds.checkpoint.storage import local_copy, storage_of
from mora_ds.common.errors import UserError, whole_number
from mora_ds.common.fetched import with_urls
from mora_ds.common.files import as_path
from mora_ds.common.tensor_files import Tensors, dtype_name
from mora_ds.deploy.export import export_merged
from mora_ds.engine import zero
from mora_ds.engine.layer_prefetcher import prefetcher_of
from mora_ds.engine.node_base import node_base_of
from mora_ds.models.base import (
    BaseCheckpoint,
    WeightMappingError,
    map_model,
    verify_against_model,
    write_own_base,
)
from mora_ds.models.rope import changes_of
from mora_ds.models.svd import from_base_weights
from mora_ds.remora.ledger import LEDGER_FILE, Ledger
from mora_ds.remora.merge import MergeReport, ReMoRA
from mora_ds.runtime.nodes import check_shared
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.non_fatal import eval_mode

PROBE_IDS = torch.arange(3, 11).unsqueeze(0)
"""(1, T): the tokens of the recorded probe, whose logits take 4 * T * vocabulary
bytes."""


class TrainingRun:
    """The state and the checkpoints of one engine, in `folder`, whatever it trains. All
    processes call it together."""

    def __init__(
        self,
        engine: zero.Engine,
        folder: Path,
        ranks: Ranks,
        state: TrainerState,
        sections: Sequence[Section],
        async_save: bool = False,
    ) -> None:
        """`state`: a new one, or that of the checkpoint which is to be loaded.
        `sections`: what a checkpoint holds."""
        self.engine = engine
        self.folder = folder
        self.ranks = ranks
        self.state = state
        self.checkpoints = self._manager(folder, sections, async_save)

    def _manager(
        self, folder: Path, sections: Sequence[Section], async_save: bool = False
    ) -> CheckpointManager:
        storage = storage_of(folder / CHECKPOINTS)
        return CheckpointManager(storage, sections, self.ranks, async_save)

    def save(
        self, step: int, keep: int | None = None, folder: Path | str | None = None
    ) -> Path:
        """Write the checkpoint of `step` and keep the newest `keep`. Returns its
        folder.

        `folder`: another one than the run's, in it; the checkpoint is then complete
        when the call returns. Raises `UserError`, and changes nothing, as `merge` does.
        """
        step = self._check_step("save", step)
        if keep is not None:
            keep = whole_number(keep, 1, "save: `keep`", ", or None for all")
        checkpoints = self.checkpoints
        if folder is not None:
            other = as_path(folder, "save: `folder`")
            checkpoints = self._manager(other, checkpoints.sections)
        self.check_base()
        return checkpoints.save(step, keep, self.state.best_step)

    def _check_step(self, method: str, step: Any, earliest: int = 0) -> int:
        """The step as an int. Raise `UserError` for one that is no whole number from
        `earliest` on, or before the newest one."""
        return whole_number(step, max(earliest, self.state.step), f"{method}: `step`")

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the last checkpoint is written; with `async_save`, before the
        end."""
        self.checkpoints.wait(timeout_s)

    def check_base(self) -> None:
        """Raise `RunError`, on all processes, when one finds that the base's files have
        changed; here none is read again."""

    def changed_base_files(self) -> list[Path]:
        """The files that `check_base` would read again on this process. Not
        collective."""
        return []

    @property
    def base_tensors(self) -> list[Tensor]:
        """The frozen weights, wherever they lie: none of them may be communicated."""
        return []

    def export(self, checkpoint: Path, target: Path, tokenizer: Any = None) -> None:
        """Write the model of the run's last checkpoint, which is the live one, as a
        Hugging Face folder; gathered one parameter at a time onto rank 0. Collective.
        """
        model = self.engine.module
        gathered: Tensors = {}
        for name, parameter in model.named_parameters():
            with zero.gathered_parameter(self.engine, parameter):
                if self.ranks.is_rank0:
                    gathered[name] = parameter.detach().cpu().clone()
        if self.ranks.is_rank0:
            write_own_base(model, target, tokenizer, state_dict=gathered)
        dist.barrier()


@dataclass(frozen=True)
class RunOptions:
    """What the main job, or another trainer, knows of a run; a loop written by a user
    needs none of it."""

    keys: Mapping[str, str] | None = None
    """Parameter name -> key in the base; None: found from the model, whose frozen
    weights are then compared too."""
    identity: Mapping[str, Any] | None = None
    """What a resumed run must share with its checkpoint besides base and adapter."""
    tokenizer_folder: Path | None = None
    """Copied into every checkpoint."""
    facts: Mapping[str, Any] | None = None
    """Further entries of adapter.json."""
    ranks: Ranks | None = None
    """Those which have found that they all see the folder; None: found by looking."""
    state: TrainerState | None = None
    """That of the checkpoint to resume, which is verified and whose identity is this
    run's; None: verified, read and compared."""
    sections: Sequence[Section] = ()
    """What checkpoints hold besides those of every adapter."""
    sides: Callable[[], Tensors] | None = None
    """{module: what is fixed of its adapter weight} in a cycle that begins, which the
    caller starts (`Run.set_fixed`); None: from the base, the same in all cycles."""


class Run(TrainingRun):
    """The merge ledger and the checkpoints of one engine, in `folder`. All processes
    make it, and call it, together.

    The adapter's config is the one that the engine's model was injected with. `base` is
    the Hugging Face folder that the model was loaded from: it is read again at every
    merge and never written. With `resume` ("auto", "latest", a path) engine, merge
    ledger and base are restored from that checkpoint, and `state` holds its position;
    without, the folder must hold no other run, unless `overwrite` is set. With
    `async_save`, `save` writes in the background. Raises `UserError` when the model
    does not hold that base, weight for weight, or the checkpoint is another run's.
    """

    def __init__(
        self,
        engine: zero.Engine,
        *,
        base: Path | str | BaseCheckpoint,
        folder: Path | str,
        resume: Path | str | None = None,
        overwrite: bool = False,
        async_save: bool = False,
        options: RunOptions | None = None,
    ) -> None:
        """`options`: what callers other than a user's loop know already."""
        base = _checked_arguments(engine, base, resume)
        folder = as_path(folder, "Run: `folder`")
        options = options or RunOptions()
        ranks = options.ranks or _ranks_that_see(folder)
        config = config_of(engine.module)
        keys = options.keys
        if keys is None:
            keys = mapped_keys(engine.module, base, ranks)
        fingerprint = base.fingerprint(ranks=ranks)
        self.identity = run_identity(fingerprint, config, options.identity)
        checkpoint, state = self._start(folder, ranks, resume, overwrite, options.state)

        ledger = Ledger(folder / LEDGER_FOLDER, fingerprint, [])
        self.remora = ReMoRA(engine, config, ledger, base, dict(keys))
        facts = {"operator": config.title, **(options.facts or {})}
        reference = _reference(engine.module, base, fingerprint, dict(keys))
        adapter = AdapterSection(self.remora, reference, facts, self._probe)
        sections = adapter_sections(adapter, state, options.tokenizer_folder)
        sections += options.sections
        super().__init__(engine, folder, ranks, state, sections, async_save)
        self._watch_gradients()
        self._new_sides = options.sides
        if checkpoint is None:
            self._new_ledger()
            if options.sides is None:
                self.set_fixed(self._fixed_of_base())
        else:
            self.checkpoints.load(checkpoint)
            self.remora.rebuild()
        is_as_loaded = options.keys is not None or config.base_bits == AS_LOADED
        if not is_as_loaded and not self.remora.cycle:
            # The model may have been loaded in another dtype than its files have: fewer
            # bits are those of the original numbers, as after a merge.
            self.remora.rebuild_base()
        base.release()

    def _start(
        self,
        folder: Path,
        ranks: Ranks,
        resume: Path | str | None,
        overwrite: bool,
        state: TrainerState | None,
    ) -> tuple[Path | None, TrainerState]:
        """(the checkpoint to resume from, its state); a new state without one. Raise
        `UserError` for another run's, and for a folder that holds another run, unless
        it may be overwritten."""
        root = folder / CHECKPOINTS
        if isinstance(resume, Path) and state is not None:
            return resume, state

        def found() -> Path | None:
            # A killed save may have left the only good one under a hidden name
            storage_of(root).repair()
            return resume_checkpoint(str(resume), root, "Run: `resume`")

        checkpoint = None
        if resume is not None:
            checkpoint = ranks.run_on_rank0(
                "checkpoint to resume from", found, long=True
            )
        elif not overwrite:
            ranks.run_on_rank0(
                "another run in the output folder", lambda: _check_new(folder)
            )
        if checkpoint is None:
            return None, TrainerState(world_size=ranks.world, identity=self.identity)
        state = TrainerState.read(local_copy(checkpoint))
        check_identity(checkpoint, state.identity, self.identity)
        return checkpoint, state

    def _new_ledger(self) -> None:
        """An empty merge ledger, in place of what a run without a checkpoint has
        left."""
        ledger = self.remora.ledger

        def write() -> None:
            Ledger.create(ledger.folder, ledger.base_fingerprint, replace=True)

        self.ranks.run_on_rank0("writing of the merge ledger", write, long=True)

    def set_fixed(self, fixed: Tensors) -> None:
        """Set the columns of adapter weights that are not trained in this cycle."""
        layers = mora_layers(self.engine.module)
        for name, tensor in fixed.items():
            layer = layers[name]
            layer.fixed = tensor.to(layer.device, layer.dtype)

    def _fixed_of_base(self) -> Tensors:
        """These columns where they follow from the base alone."""
        remora = self.remora
        layers = mora_layers(self.engine.module)
        return from_base_weights(
            {name: layer for name, layer in layers.items() if layer.fixed is not None},
            remora.base,
            remora.keys,
            self.ranks,
            lambda layer: layer.get_buffer("fixed").shape,
            lambda name, layer, weight: layer.fixed_of(weight),
        )

    def _watch_gradients(self) -> None:
        """Record the micro-step of the newest gradient."""
        self._gradient_of: int | None = None
        """`engine.micro_steps` at the newest backward pass. `engine.step` counts that
        up, so that the two are equal while gradients wait for their step."""
        first_layer = next(iter(mora_layers(self.engine.module).values()))
        # Not that of `value`, which may be frozen where there are domains, and then has
        # no gradient.
        trained = next(first_layer.parameters(recurse=False))
        trained.register_hook(self._note_gradient)

    def merge(
        self, step: int, loss_fn: Callable[[], float] | None = None
    ) -> MergeReport:
        """Merge the MoRA matrices of all layers after optimizer step `step` and start
        the next cycle.

        `loss_fn`: as in `ReMoRA.merge`. Raises `UserError`, and changes nothing, for a
        `step` before those of earlier calls, and while the engine has gradients of
        which no optimizer step has been made.
        """
        earliest = self.state.merges[-1] + 1 if self.state.merges else 0
        step = self._check_step("merge", step, earliest)
        if loss_fn is not None and not callable(loss_fn):
            raise UserError(
                f"merge: `loss_fn` must be a function without arguments, got {loss_fn!r}"
            )
        self.check_base()
        report = self.remora.merge(step, loss_fn)
        if self._new_sides is not None:
            self.set_fixed(self._new_sides())
        self.state.merges.append(step)
        return report

    def _check_step(self, method: str, step: Any, earliest: int = 0) -> int:
        """As of every run, from the last merge on. Raise `UserError` also in the middle
        of an optimizer step, whose gradients would be of another adapter, or lost."""
        merged = self.state.merges[-1] if self.state.merges else 0
        number = super()._check_step(method, step, max(earliest, merged))
        has_gradients = self._gradient_of == self.engine.micro_steps
        if has_gradients or not zero.at_accumulation_boundary(self.engine):
            raise UserError(
                f"{method}: the engine has gradients of which no optimizer step is made yet: call it after the "
                "engine.step() that ends gradient accumulation"
            )
        return number

    def _note_gradient(self, gradient: Tensor) -> None:
        self._gradient_of = self.engine.micro_steps

    def check_base(self) -> None:
        """Raise `RunError`, on all processes, when one finds that the base's files have
        changed."""
        base = self.remora.base
        fingerprint = self.remora.ledger.base_fingerprint
        self.ranks.agree(
            "files of the base", lambda: base.require_unchanged(fingerprint)
        )

    def changed_base_files(self) -> list[Path]:
        """The files that `check_base` would read again on this process. Not
        collective."""
        return self.remora.base.changed_files()

    def export(self, checkpoint: Path, target: Path, tokenizer: Any = None) -> None:
        """Write the merged model of a checkpoint, and the tokenizer that the checkpoint
        or else the base has, into the folder `target`; where there are domains, one
        model each, into a folder of its name there. `tokenizer` is not read.
        Collective."""
        domains = domains_of(self.engine.module).names
        # The model's own code, which tells what it keeps in fp32, runs already
        has_own_code = type(self.engine.module).__module__.startswith(
            "transformers_modules"
        )

        def export() -> None:
            folder = local_copy(checkpoint)
            for domain in (SHARED, *domains) if domains else (None,):
                export_merged(
                    folder,
                    target / (domain or ""),
                    overwrite=True,
                    domain=domain,
                    trust_remote_code=has_own_code,
                )

        self.ranks.run_on_rank0("export of the merged model", export, long=True)

    @property
    def base_tensors(self) -> list[Tensor]:
        """The frozen weights, wherever they lie: none of them may be communicated."""
        model = self.engine.module
        tensors = list(frozen_buffers(model).values())
        prefetcher = prefetcher_of(model)
        if prefetcher is not None:
            tensors += prefetcher.slots
        # Some of the slots are used from the first merge on.
        tensors += node_base_of(model).slots.values()
        return tensors

    def _probe(self) -> Tensors:
        """`PROBE_IDS`, and their logits (1, T, vocabulary) in fp32, without dropout,
        with the shared matrices alone and for every domain, for `export --verify`."""
        engine = self.engine
        ids = PROBE_IDS.to(engine.device)
        probe = {"input_ids": PROBE_IDS}
        for domain in (None, *domains_of(engine.module).names):
            with eval_mode(engine, domain, unsplit=True):
                logits = engine(input_ids=ids, use_cache=False).logits
            probe[logits_name(domain)] = logits.float().cpu()
        return probe


# -- starting --------------------------------------------------------------------------


def _checked_arguments(
    engine: Any, base: Path | str | BaseCheckpoint, resume: Path | str | None
) -> BaseCheckpoint:
    """The opened base. Raise `UserError` for arguments of another type, and for a
    scheduler that no checkpoint can hold, before anything is trained."""
    if not isinstance(engine, zero.Engine):
        raise UserError(
            f"Run: `engine` must be what mora_ds.initialize returns first, got a {type(engine).__name__}"
        )
    if not isinstance(base, BaseCheckpoint):
        base = BaseCheckpoint.open(as_path(base, "Run: `base`"), "base")
    if resume is not None:
        as_path(resume, "Run: `resume`")
    scheduler_state(engine.lr_scheduler)
    return base


def _ranks_that_see(folder: Path) -> Ranks:
    """All ranks, when they have found that they see the same folder. Collective."""
    ranks = Ranks.current()
    ranks.run_on_rank0(
        "output folder", lambda: folder.mkdir(parents=True, exist_ok=True)
    )
    check_shared(folder, ranks)
    return ranks


def _check_new(folder: Path) -> None:
    """Raise `UserError` for a folder that holds a run."""
    has_ledger = (folder / LEDGER_FOLDER / LEDGER_FILE).exists()
    if has_ledger or complete_checkpoints(folder / CHECKPOINTS):
        raise UserError(
            f'{folder} holds another run: choose another folder, or resume="auto"'
        )


def _reference(
    model: Any, base: BaseCheckpoint, fingerprint: str, keys: dict[str, str]
) -> BaseReference:
    """What a checkpoint records of the base."""
    first_layer = next(iter(mora_layers(model).values()))
    dtype = dtype_name(first_layer.dtype)
    changes = changes_of(model.config, base.folder)
    folder = with_urls(base.folder.resolve())
    return BaseReference(folder, fingerprint, keys, dtype, changes)


def mapped_keys(model: Any, base: BaseCheckpoint, ranks: Ranks) -> dict[str, str]:
    """Parameter name -> key in the base, for every parameter; the frozen ones are
    compared with it bit for bit, quantized ones to within their rounding."""
    frozen = base_weights(model)
    adapted = adapter_parameter_names(model)
    trained = [name for name, _ in model.named_parameters() if name not in adapted]
    keys = map_model(base, model, [*frozen, *map(stands_for, trained)])
    rounded = quantized_layers(model)
    unquantized = {
        name: weight
        for name, weight in frozen.items()
        if name.removesuffix(".weight") not in rounded
    }
    # Each rank compares a share of the weights, which lie on its own device.
    share = list(unquantized)[ranks.rank :: ranks.world]
    ranks.agree(
        "weights of the base",
        lambda: verify_against_model(base, keys, unquantized, share),
        long=True,
    )
    ranks.run_on_rank0(
        "quantized weights of the base",
        lambda: _verify_rounded(base, keys, rounded),
        long=True,
    )
    return keys


def _verify_rounded(
    base: BaseCheckpoint, keys: Mapping[str, str], layers: Mapping[str, AdaptedLinear]
) -> None:
    """Raise `WeightMappingError` naming the first quantized weight that differs from its
    original by more than rounding, the quantization's and that of the dtype in which
    the model was loaded."""
    for name, layer in layers.items():
        frozen = layer.frozen
        weight = layer.spec.weight_name(name)
        key = keys[weight]
        assert isinstance(frozen, QuantizedWeight)
        original = base.read(key).to(layer.weight.device, torch.float32)
        is_same = original.shape == layer.shape
        if is_same:
            rounding = 2 * frozen.largest_error
            is_same = torch.allclose(layer.read(), original, rtol=2**-8, atol=rounding)
        if not is_same:
            raise WeightMappingError(
                f"{weight} of the model is not, in {frozen.bits} bits, the tensor {key!r} of {base.folder}"
            )
