"""A run around an engine: resume, merge, save, export.

    run = Run(engine, base="path/of/the/model", folder="out")      resume="auto" continues what is there
    run.merge(step)        at intervals: ReMoRA
    run.save(step)         out/checkpoints/step-N, from which export_merged makes a model

The main job, Hugging Face's Trainer and loops of users call the same methods. `FullRun`
is the same for full training, which has neither base nor merges.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.adapters.config import AS_LOADED
from mora_ds.adapters.domains import domain_layers, domains_of
from mora_ds.adapters.inject import base_weights, config_of, frozen_buffers, set_cycle
from mora_ds.adapters.layer import AdaptedLinear, mora_layers, value_names
from mora_ds.adapters.new_embeddings import stands_for
from mora_ds.adapters.ops.frozen import QuantizedWeight
from mora_ds.adapters.quantized import quantized_layers
from mora_ds.checkpoint.adapter_files import (
    AdapterFile,
    BaseReference,
    DomainSquares,
    logits_name,
    read_adapter,
    write_adapter,
)
from mora_ds.checkpoint.layout import (
    ADAPTER_JSON,
    CHECKPOINTS,
    LEDGER_FOLDER,
    PROBE_FILE,
    TOKENIZER_FOLDER,
    complete_checkpoints,
    resume_checkpoint,
)
from mora_ds.checkpoint.state import TrainerState, check_identity, run_identity
from mora_ds.checkpoint.writer import CheckpointWriter, load_checkpoint
from mora_ds.common.errors import UserError, whole_number
from mora_ds.common.files import JsonObject, as_path, copy_folder
from mora_ds.common.nested import different_keys
from mora_ds.common.tensor_files import Tensors, dtype_name, write_safetensors_atomic
from mora_ds.deploy.export import export_merged
from mora_ds.engine import zero
from mora_ds.engine.base_ring import ring_of
from mora_ds.models.base import (
    BaseCheckpoint,
    NotOneToOne,
    map_model,
    verify_against_model,
    write_own_base,
)
from mora_ds.models.node_base import node_base_of
from mora_ds.models.rope import changes_of
from mora_ds.remora.ledger import LEDGER_FILE, Ledger
from mora_ds.remora.merge import MergeReport, ReMoRA, layer_entries
from mora_ds.runtime.nodes import check_shared
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.beside import beside_training

PROBE_IDS = torch.arange(3, 11).unsqueeze(0)
"""(1, T): the tokens of the recorded probe, whose logits take 4 * T * vocabulary
bytes."""


class Run:
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
        keys: Mapping[str, str] | None = None,
        identity: Mapping[str, Any] | None = None,
        tokenizer_folder: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        state: TrainerState | None = None,
    ) -> None:
        """What a loop written by a user need not give:

        `keys`: parameter name -> key in the base; None: found from the model, whose
        frozen weights are then compared too. `identity`: what a resumed run must share
        with its checkpoint besides base and adapter. `tokenizer_folder`: copied into
        every checkpoint. `facts`: further entries of adapter.json. `ranks`: those which
        have found that they all see `folder`; None: found by looking. `state`: that of
        the checkpoint `resume`, which is verified and whose identity is this run's;
        None: verified, read and compared.
        """
        if not isinstance(engine, zero.Engine):
            raise UserError(
                f"Run: `engine` must be what mora_ds.initialize returns first, got a {type(engine).__name__}"
            )
        if not isinstance(base, BaseCheckpoint):
            base = BaseCheckpoint.open(as_path(base, "Run: `base`"), "base")
        if resume is not None:
            as_path(resume, "Run: `resume`")
        config = config_of(engine.module)
        # One that no checkpoint can hold is refused here, before anything is trained.
        _scheduler_state(engine.lr_scheduler)

        self.engine = engine
        self._gradient_of: int | None = None
        """`engine.micro_steps` at the newest backward pass. `engine.step` counts that
        up, so that the two are equal while gradients wait for their step."""
        first_layer = next(iter(mora_layers(engine.module).values()))
        # Not that of `value`, which may be frozen where there are domains, and then has
        # no gradient.
        trained = next(first_layer.parameters(recurse=False))
        trained.register_hook(self._note_gradient)

        self.folder = as_path(folder, "Run: `folder`")
        if ranks is None:
            ranks = Ranks.current()
            ranks.on_first(
                "output folder", lambda: self.folder.mkdir(parents=True, exist_ok=True)
            )
            check_shared(self.folder, ranks)
        self.ranks = ranks

        is_mapped = keys is not None
        keys = self._map(base) if keys is None else dict(keys)
        fingerprint = base.fingerprint(ranks=ranks)

        self.identity = run_identity(fingerprint, config, identity)
        # A checkpoint that is given with its state was verified by the caller, and
        # compared with this run.
        if isinstance(resume, Path) and state is not None:
            checkpoint: Path | None = resume
        else:
            checkpoint = self._checkpoint(resume, overwrite)
        if checkpoint is not None and state is None:
            state = TrainerState.read(checkpoint)
            check_identity(checkpoint, state.identity, self.identity)
        new_state = TrainerState(world_size=ranks.world, identity=self.identity)
        self.state = state or new_state

        ledger = self._open_ledger(checkpoint, fingerprint)
        self.remora = ReMoRA(engine, config, ledger, base, keys)
        dtype = dtype_name(first_layer.dtype)
        changes = changes_of(engine.module.config, base.folder)
        base_folder = str(base.folder.resolve())
        self._reference = BaseReference(base_folder, fingerprint, keys, dtype, changes)
        self._tokenizer_folder = tokenizer_folder
        self._facts = {"operator": config.title, **(facts or {})}
        self.checkpoints = CheckpointWriter(
            self.folder / CHECKPOINTS, engine, self._gather, ranks, async_save
        )
        if checkpoint is not None:
            self._restore(checkpoint)
        if not is_mapped and config.base_bits != AS_LOADED and not self.remora.cycle:
            # The model may have been loaded in another dtype than its files have: fewer
            # bits are those of the original numbers, as after a merge.
            self.remora.form_base()
        base.release()

    def merge(self, step: int, probe: Callable[[], float] | None = None) -> MergeReport:
        """Merge the MoRA matrices of all layers after optimizer step `step` and start
        the next cycle.

        `probe`: as in `ReMoRA.merge`. Raises `UserError`, and changes nothing, for a
        `step` before those of earlier calls, and while the engine has gradients of
        which no optimizer step has been made.
        """
        earliest = self.state.merges[-1] + 1 if self.state.merges else 0
        step = self._check_call("merge", step, earliest)
        if probe is not None and not callable(probe):
            raise UserError(
                f"merge: `probe` must be a function without arguments, got {probe!r}"
            )
        self.check_base()
        report = self.remora.merge(step, probe)
        self.state.merges.append(step)
        return report

    def save(
        self, step: int, keep: int | None = None, folder: Path | str | None = None
    ) -> Path:
        """Write the checkpoint of `step` and keep the newest `keep`. Returns its
        folder.

        `folder`: another one than the run's, in it; the checkpoint is then complete
        when the call returns. Raises `UserError`, and changes nothing, as `merge` does.
        """
        earliest = self.state.merges[-1] if self.state.merges else 0
        step = self._check_call("save", step, earliest)
        if keep is not None:
            keep = whole_number(keep, 1, "save: `keep`", ", or None for all")
        checkpoints = self.checkpoints
        if folder is not None:
            root = as_path(folder, "save: `folder`") / CHECKPOINTS
            checkpoints = CheckpointWriter(root, self.engine, self._gather, self.ranks)
        self.state.scheduler = _scheduler_state(self.engine.lr_scheduler)
        self.state.step = step
        self.check_base()
        return checkpoints.save(self.state, keep)

    def _check_call(self, method: str, step: Any, earliest: int) -> int:
        """The step as an int. Raise `UserError` for one that is no whole number from
        `earliest` on, or before the newest one, and in the middle of an optimizer step,
        whose gradients would be of another adapter, or lost."""
        number = whole_number(step, max(earliest, self.state.step), f"{method}: `step`")
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

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the last checkpoint is written; with `async_save`, before the
        end."""
        self.checkpoints.wait(timeout_s)

    def export(
        self, checkpoint: Path, target: Path, domains: Sequence[str] = ()
    ) -> None:
        """Write the merged model of a checkpoint into the folder `target`; of each of
        the `domains`, into a folder of its name there. Collective."""
        # The model's own code, which tells what it keeps in fp32, runs already
        has_own_code = type(self.engine.module).__module__.startswith(
            "transformers_modules"
        )

        def export() -> None:
            for domain in domains or (None,):
                export_merged(
                    checkpoint,
                    target / (domain or ""),
                    overwrite=True,
                    domain=domain,
                    trust_remote_code=has_own_code,
                )

        self.ranks.on_first("export of the merged model", export, long=True)

    @property
    def base_tensors(self) -> list[Tensor]:
        """The frozen weights, wherever they lie: none of them may be communicated."""
        model = self.engine.module
        tensors = list(frozen_buffers(model).values())
        ring = ring_of(model)
        if ring is not None:
            tensors += ring.slots
        # Some of the slots are used from the first merge on.
        tensors += node_base_of(model).slots.values()
        return tensors

    # -- what a checkpoint holds besides the engine's shards ---------------------------

    def _gather(self, step: int) -> Callable[[Path], None]:
        """Gather the adapter onto rank 0, one matrix at a time. The returned function
        writes it with all that belongs to it into a folder, however training goes on
        meanwhile. Collective."""
        model = self.engine.module
        layers = mora_layers(model)
        domains = domain_layers(model)
        squares = self._on_first(
            (name, layer.unshard(zero.full_fp32(layer.value)))
            for name, layer in layers.items()
        )
        # Beside the adapter: embeddings, norms and head, each tied one by its first
        # name.
        adapted = value_names(model)
        trained = self._on_first(
            (name, zero.full_fp32(value))
            for name, value in model.named_parameters()
            if name not in adapted
        )
        domain_squares = self._on_first(
            (name, zero.full_fp32(layer.domain_squares))
            for name, layer in domains.items()
        )
        probe = self._probe()
        of_domains = None
        if domains:
            operators = {name: layer.own_spec for name, layer in domains.items()}
            of_domains = DomainSquares(domains_of(model).names, operators)
        adapter = AdapterFile(
            layers=layer_entries(model),
            config=self.remora.config,
            dtype=self._reference.dtype,
            cycle=self.remora.cycle,
            step=step,
            trainables=tuple(trained),
            domains=of_domains,
            facts=self._facts,
        )
        ledger = self.remora.ledger.snapshot()

        def write(folder: Path) -> None:
            if not self.ranks.is_first:
                return
            write_adapter(folder, adapter, squares, trained, domain_squares)
            self._reference.write(folder)
            ledger.copy_to(folder / LEDGER_FOLDER)
            # Copied, not linked: a file that is damaged would be so in every
            # checkpoint.
            if self._tokenizer_folder is not None:
                copy_folder(self._tokenizer_folder, folder / TOKENIZER_FOLDER)
            dtype = {"dtype": self._reference.dtype}
            write_safetensors_atomic(folder / PROBE_FILE, probe, dtype)

        return write

    def _on_first(self, tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
        """{name: copy in host memory} on rank 0, nothing on other ranks. `tensors` may
        gather each one as it is asked for, so that all ranks go through them."""
        return {
            name: tensor.to("cpu", copy=True)
            for name, tensor in tensors
            if self.ranks.is_first
        }

    def _probe(self) -> Tensors:
        """`PROBE_IDS`, and their logits (1, T, vocabulary) in fp32, without dropout,
        with the shared matrices alone and for every domain, for `export --verify`."""
        engine = self.engine
        ids = PROBE_IDS.to(engine.device)
        probe = {"input_ids": PROBE_IDS}
        for domain in (None, *domains_of(engine.module).names):
            with beside_training(engine, domain, whole=True):
                logits = engine(input_ids=ids, use_cache=False).logits
            probe[logits_name(domain)] = logits.float().cpu()
        return probe

    def _restore(self, checkpoint: Path) -> None:
        """Bring operators, engine, scheduler and the live base to the checkpoint's
        state. Raises `UserError` where it has other operators than this model."""
        model = self.engine.module
        adapter = read_adapter(checkpoint)
        set_cycle(model, self.remora.config, adapter.cycle)
        live = layer_entries(model)
        # A matrix that was trained in another operator means another update in this
        # one.
        for name in different_keys(adapter.layers, live):
            raise UserError(
                f"{checkpoint / ADAPTER_JSON}: {name} has another operator there than in this model, or is not adapted "
                "in both"
            )
        load_checkpoint(checkpoint, self.engine, self.state)
        scheduler = self.engine.lr_scheduler
        if scheduler is not None and self.state.scheduler is not None:
            scheduler.load_state_dict(self.state.scheduler)
            # The next step is made with these rates: the scheduler itself sets others
            # only after it.
            groups = self.engine.optimizer.param_groups
            for group, rate in zip(groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        self.remora.replay()

    def _checkpoint(self, resume: Path | str | None, overwrite: bool) -> Path | None:
        """The checkpoint to resume from, if any. Raise `UserError` for a folder that
        holds another run, unless it may be overwritten."""
        root = self.folder / CHECKPOINTS

        def holds_run() -> bool:
            has_ledger = (self.folder / LEDGER_FOLDER / LEDGER_FILE).exists()
            return has_ledger or bool(complete_checkpoints(root))

        def find() -> Path | None:
            return resume_checkpoint(str(resume), root, "Run: `resume`")

        if resume is not None:
            return self.ranks.on_first("checkpoint to resume from", find, long=True)
        is_another = self.ranks.on_first("another run in the output folder", holds_run)
        if is_another and not overwrite:
            raise UserError(
                f'{self.folder} holds another run: choose another folder, or resume="auto"'
            )
        return None

    def _open_ledger(self, checkpoint: Path | None, fingerprint: str) -> Ledger:
        """The checkpoint's merge ledger, or an empty one in place of what a run without
        a checkpoint has left. Rank 0 writes it, and hashes what it has written."""
        folder = self.folder / LEDGER_FOLDER

        def write() -> None:
            if checkpoint is None:
                Ledger.create(folder, fingerprint, replace=True)
                return
            saved = Ledger.open(checkpoint / LEDGER_FOLDER, fingerprint, hashes=False)
            saved.copy_to(folder)
            Ledger.open(folder, fingerprint)

        self.ranks.on_first("writing of the merge ledger", write, long=True)
        return self.ranks.agree(
            "merge ledger", lambda: Ledger.open(folder, fingerprint, hashes=False)
        )

    def _map(self, base: BaseCheckpoint) -> dict[str, str]:
        """Parameter name -> key in the base, for every parameter; the frozen ones are
        compared with it bit for bit, quantized ones to within their rounding."""
        model: Any = self.engine.module
        frozen = base_weights(model)
        adapted = value_names(model)
        trained = [name for name, _ in model.named_parameters() if name not in adapted]
        keys = map_model(base, model, [*frozen, *map(stands_for, trained)])
        rounded = quantized_layers(model)
        unquantized = {
            name: weight
            for name, weight in frozen.items()
            if name.removesuffix(".weight") not in rounded
        }
        # Each rank compares a share of the weights, which lie on its own device.
        share = list(unquantized)[self.ranks.rank :: self.ranks.world]
        self.ranks.agree(
            "weights of the base",
            lambda: verify_against_model(base, keys, unquantized, share),
            long=True,
        )
        self.ranks.on_first(
            "quantized weights of the base",
            lambda: _verify_rounded(base, keys, rounded),
            long=True,
        )
        return keys


class FullRun(Run):
    """The checkpoints of an engine that trains every parameter, without base and
    merges."""

    def __init__(
        self,
        engine: zero.Engine,
        *,
        folder: Path,
        state: TrainerState,
        ranks: Ranks,
        resume: Path | None,
        async_save: bool,
        tokenizer: Any,
    ) -> None:
        """`state`: a new one, or that of the verified checkpoint `resume`. `tokenizer`:
        saved with the model."""
        self.engine = engine
        self.folder = folder
        self.state = state
        self.ranks = ranks
        self.tokenizer = tokenizer
        self._gradient_of = None
        self.checkpoints = CheckpointWriter(
            folder / CHECKPOINTS, engine, self._gather, ranks, async_save
        )
        if resume is not None:
            load_checkpoint(resume, engine, state)

    def check_base(self) -> None:
        """Check nothing: the weights are trained, and no file is read again."""

    def changed_base_files(self) -> list[Path]:
        """No file is read again."""
        return []

    @property
    def base_tensors(self) -> list[Tensor]:
        """No weight is frozen."""
        return []

    def _gather(self, step: int) -> Callable[[Path], None]:
        return lambda folder: None

    def export(
        self, checkpoint: Path, target: Path, domains: Sequence[str] = ()
    ) -> None:
        """Write the live model, which is that of the last checkpoint, as a Hugging Face
        folder; gathered one parameter at a time onto rank 0. Collective."""
        model = self.engine.module
        gathered: Tensors = {}
        for name, parameter in model.named_parameters():
            with zero.whole_parameter(self.engine, parameter):
                if self.ranks.is_first:
                    gathered[name] = parameter.detach().cpu().clone()
        if self.ranks.is_first:
            write_own_base(model, target, self.tokenizer, state_dict=gathered)
        dist.barrier()


def _scheduler_state(scheduler: Any) -> JsonObject | None:
    """The state of an engine's scheduler for trainer_state.json; None without a
    scheduler. Raises `UserError` for a state that JSON does not give back as it was."""
    if scheduler is None:
        return None
    state: JsonObject = scheduler.state_dict()
    try:
        comes_back = json.loads(json.dumps(state, allow_nan=False)) == state
    except (TypeError, ValueError):
        comes_back = False
    if not comes_back:
        raise UserError(
            f"initialize: the state of `lr_scheduler`, a {type(scheduler).__name__}, does not fit in a checkpoint: "
            'take LambdaLR of torch, or set "lr" of engine.optimizer.param_groups in each step'
        )
    return state


def _verify_rounded(
    base: BaseCheckpoint, keys: Mapping[str, str], layers: Mapping[str, AdaptedLinear]
) -> None:
    """Raise `NotOneToOne` naming the first quantized weight that differs from its
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
            raise NotOneToOne(
                f"{weight} of the model is not, in {frozen.bits} bits, the tensor {key!r} of {base.folder}"
            )
