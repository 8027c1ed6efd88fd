"""What is trained, made ready: a base and an adapter, or a control, become a job with an engine.

--adapter mora, lora   base -> squares (factors) -> engine -> Run (ledger, checkpoints)
--adapter full         every parameter under plain ZeRO
--adapter none         the base as it is, to be evaluated
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.alignment import Alignment
from mora_ds.adapters.config import SHARED, AdapterConfig, MoRAConfig
from mora_ds.adapters.domains import domains_of
from mora_ds.adapters.inject import count_parameters, frozen_buffers, inject
from mora_ds.adapters.target_plan import TargetPlan
from mora_ds.adapters.tp_plan import plan_of
from mora_ds.checkpoint.contents import PROBE_TOKENS, save_full_model
from mora_ds.checkpoint.layout import BASE_FOLDER, CHECKPOINTS
from mora_ds.checkpoint.state import TrainerState, check_identity
from mora_ds.checkpoint.writer import CheckpointWriter, load_checkpoint
from mora_ds.config.adapter import AdapterKind
from mora_ds.config.arguments import Arguments
from mora_ds.config.domains import adapter_config
from mora_ds.data import largest_id
from mora_ds.deploy.export import export_merged
from mora_ds.engine.device import current_device
from mora_ds.engine.ds_config import compute_dtype, fill_bucket_sizes
from mora_ds.engine.initialize import initialize, initialize_full, trainable_numels
from mora_ds.models.load import LoadedBase, config_digest, create_base, load_base
from mora_ds.models.vocabulary import first_new_row
from mora_ds.parallel.saved_inputs import TPInputs
from mora_ds.parallel.ulysses import share_rows
from mora_ds.parallel.ulysses_checks import describe
from mora_ds.planning.costs import costs
from mora_ds.remora.merge import ReMoRA
from mora_ds.remora.optimizer_reset import OptimizerReset
from mora_ds.runtime.nodes import Followers
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.data import RunData
from mora_ds.train.init_adapter import FirstSquares
from mora_ds.train.run import Run, run_identity
from mora_ds.train.targets import RunTargets
from mora_ds.train.vectors import FOLDER as VECTORS_FOLDER
from mora_ds.train.vectors import needs_vectors, prepare_vectors, wanted_vectors


@dataclass(frozen=True)
class Place:
    """Where a run happens."""

    folder: Path
    ranks: Ranks
    checkpoint: Path | None
    """What it resumes from."""
    say: Callable[..., None]
    base: Path | None
    """What it starts from in place of the model that the flags name: the result of --full_rank_steps."""
    followers: Followers
    targets: TargetPlan | None = None
    """The plan of squares of --targets FILE."""


@dataclass(frozen=True)
class Job:
    """An engine, and what a checkpoint and the report need of what it trains."""

    engine: Any
    """A DeepSpeed engine, or for --adapter none the bare model."""
    state: TrainerState
    """Where it stands: at the beginning, or where the checkpoint left off."""
    remora: ReMoRA | None
    save: Callable[[TrainerState, int | None], Path]
    wait: Callable[[float | None], None]
    """Until what `save` began is written."""
    export: Callable[[Path, Path], None]
    """Writes the merged model of a checkpoint into a folder."""
    base_tensors: Mapping[str, Tensor]
    trainable_params: int
    total_params: int
    split: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda batch: batch
    """A rank's part of rows that it shares with others."""
    alignment: Alignment | None = None
    """What --alignment_weight adds to the loss."""


def rows_per_step(arguments: Arguments, world: int) -> int:
    """Global batch size, in sequences."""
    training = arguments.training
    replicas = world // training.ranks_per_replica
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * replicas


def prepare_job(
    arguments: Arguments, loaded: LoadedBase, ds_config: dict[str, Any], data: RunData, place: Place
) -> Job:
    """The job that --adapter asks for, as its checkpoint has it where it resumes from one.

    Raises `UserError` for targets that do not match and a checkpoint that is another run's.
    """
    size = arguments.training.sequence_parallel_size
    sequence = share_rows(loaded.model, size, arguments.training.collective_timeout_s)
    if sequence is None:
        return _unshared_job(arguments, loaded, ds_config, data, place)
    place.say(describe(loaded.model.config, size, data.train.seq_len))
    return replace(_unshared_job(arguments, loaded, ds_config, data, place), split=sequence.split)


def _unshared_job(
    arguments: Arguments, loaded: LoadedBase, ds_config: dict[str, Any], data: RunData, place: Place
) -> Job:
    if arguments.adapter.adapter == AdapterKind.NONE.value:
        return _bare_job(loaded, place)
    full = arguments.adapter.adapter == AdapterKind.FULL.value
    return (_full_job if full else _adapter_job)(arguments, loaded, ds_config, data, place)


def prepare_base(
    arguments: Arguments, model_folder: Path | None, tokenizer: Any, ds_config: dict[str, Any], place: Place
) -> LoadedBase:
    """The base on this rank, whole; made from --model_config where that is what there is."""
    model, own, ranks = arguments.model, place.folder / BASE_FOLDER, place.ranks
    if model_folder is None:
        config_file, vocabulary = Path(str(model.model_config)).expanduser(), largest_id(tokenizer)[1] + 1

        def create() -> None:
            if place.checkpoint is None or not (own / "config.json").exists():
                create_base(config_file, own, arguments.training.seed, tokenizer, vocabulary)

        ranks.on_first(create)
        place.followers.share(own)
        model_folder = own
    dtype = getattr(torch, compute_dtype(ds_config))
    loaded = load_base(model_folder, own, ranks, dtype, model.attention, model.trust_remote_code, place.followers.share)
    if arguments.training.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return loaded


def _adapter_job(
    arguments: Arguments, loaded: LoadedBase, ds_config: dict[str, Any], data: RunData, place: Place
) -> Job:
    config, ranks = adapter_config(arguments.adapter, arguments.data, arguments.training.seed), place.ranks
    if arguments.adapter.train_new_embeddings:
        config = replace(config, new_rows_from=first_new_row(loaded.base.folder))
    targets = RunTargets(arguments.adapter, place.targets, place.folder, place.checkpoint, ranks, place.say)
    config = targets.planned(config, loaded.model, loaded.base, loaded.keys)
    degree, inputs = arguments.training.tensor_parallel_size, TPInputs(arguments.training.tp_inputs)
    device = current_device()
    settings = arguments.adapter
    config = _with_vectors(config, settings.alignment_rank if settings.alignment_weight else 0, loaded, place)
    report = inject(loaded.model, config, lambda name: loaded.base.read(loaded.keys[name]).to(device))
    place.say(report)
    alignment = None
    if settings.alignment_weight and isinstance(config, MoRAConfig):
        alignment = Alignment(loaded.model, config.vectors, settings.alignment_weight, settings.alignment_rank)
    numels = trainable_numels(loaded.model, degree)
    if degree > 1:
        place.say(plan_of(loaded.model, degree))
    tokens = arguments.training.per_device_train_batch_size * data.train.seq_len
    tokens //= arguments.training.sequence_parallel_size
    if ds_config["zero_optimization"]["stage"] == 3:
        place.say(costs(loaded.model, degree, ranks.world // degree, tokens, inputs=inputs))
    fingerprint = ranks.on_first(loaded.base.fingerprint)
    precision = arguments.adapter.merge_precision
    common = _common_identity(arguments, data, ds_config, ranks.world, loaded)
    _check_checkpoint(place.checkpoint, run_identity(fingerprint, config, precision, common))
    ds_config = fill_bucket_sizes(ds_config, numels)
    init = arguments.adapter.init_adapter if place.checkpoint is None else None
    first = None if init is None else ranks.agree(lambda: FirstSquares.open(Path(init), loaded.model, fingerprint))
    engine, *_ = initialize(
        model=loaded.model, config=ds_config, tensor_parallel_size=degree, tensor_parallel_inputs=inputs
    )
    _seed(arguments, ranks)
    run = Run(
        engine,
        config,
        loaded.base,
        place.folder,
        resume=place.checkpoint,
        overwrite=True,
        keys=loaded.keys,
        precision=precision,
        reset=OptimizerReset(arguments.adapter.optimizer_reset),
        identity=common,
        tokenizer_folder=data.tokenizer_folder,
        probe_ids=data.train.first_rows(1)["input_ids"][:, :PROBE_TOKENS],
        facts={"seq_len": data.train.seq_len},
        async_save=arguments.training.async_save,
        followers=place.followers,
    )

    if first is not None:
        place.say(first.put(engine))
    names = domains_of(engine.module).names

    def export(checkpoint: Path, target: Path) -> None:
        ranks.on_first(lambda: _export(checkpoint, target, names))

    base_tensors, counts = frozen_buffers(loaded.model), (report.trainable_params, report.total_params)
    job = Job(engine, run.state, run.remora, run.save_state, run.wait, export, base_tensors, *counts)
    return replace(job, alignment=alignment)


def _with_vectors(config: AdapterConfig, alignment_rank: int, loaded: LoadedBase, place: Place) -> AdapterConfig:
    if not isinstance(config, MoRAConfig) or not needs_vectors(config, alignment_rank):
        return config
    wanted = wanted_vectors(loaded.model, config, loaded.keys, alignment_rank)
    if place.checkpoint is None:
        exact = sum(each.is_exact for each in wanted.values())
        place.say(
            f"singular vectors of {len(wanted)} weights, {exact} of them decomposed exactly: "
            f"{place.folder / VECTORS_FOLDER}"
        )
    device = current_device()
    share = place.followers.share
    return prepare_vectors(config, wanted, loaded.base, place.folder, place.ranks, share, place.checkpoint, device)


def _export(checkpoint: Path, target: Path, domains: tuple[str, ...]) -> None:
    """With domains one model each, and the shared one, in folders of their names."""
    if not domains:
        export_merged(checkpoint, target, overwrite=True)
    for domain in (SHARED, *domains) if domains else ():
        export_merged(checkpoint, target / domain, overwrite=True, domain=domain)


def _bare_job(loaded: LoadedBase, place: Place) -> Job:
    total = count_parameters(loaded.model)
    place.say(f"nothing is trained, the control: all {total:,} parameters stay as they are")
    loaded.model.to(current_device()).requires_grad_(False)

    def refuse(*anything: object) -> Any:
        raise AssertionError("there is nothing to save")

    return Job(loaded.model, TrainerState(), None, refuse, _nothing, refuse, {}, 0, total)


def _full_job(arguments: Arguments, loaded: LoadedBase, ds_config: dict[str, Any], data: RunData, place: Place) -> Job:
    total = count_parameters(loaded.model)
    place.say(f"full training, the control: all {total:,} parameters, sharded by ZeRO as ever")
    identity = {"adapter": {"kind": "full"}, **_common_identity(arguments, data, ds_config, place.ranks.world, loaded)}
    _check_checkpoint(place.checkpoint, identity)
    ds_config = fill_bucket_sizes(ds_config, [parameter.numel() for parameter in loaded.model.parameters()])
    engine, *_ = initialize_full(model=loaded.model, config=ds_config)
    _seed(arguments, place.ranks)
    state = TrainerState(world_size=place.ranks.world, identity=identity)
    if place.checkpoint is not None:
        state = load_checkpoint(place.checkpoint, engine, identity)

    root = place.folder / CHECKPOINTS
    writer = CheckpointWriter(root, engine, lambda step: _nothing, arguments.training.async_save, place.followers)

    def export(checkpoint: Path, target: Path) -> None:
        save_full_model(engine, target, data.tokenizer)

    return Job(engine, state, None, writer.save, writer.wait, export, {}, total, total)


def _nothing(*anything: object) -> None:
    del anything


def _seed(arguments: Arguments, ranks: Ranks) -> None:
    """Before a checkpoint restores the random states: dropout draws other masks on every replica."""
    torch.manual_seed((arguments.training.seed << 16) + ranks.rank // arguments.training.ranks_per_replica)


def _common_identity(
    arguments: Arguments, data: RunData, ds_config: dict[str, Any], world: int, loaded: LoadedBase
) -> dict[str, Any]:
    """What must not change in mid-run for batches and states to follow on."""
    return {
        "model_config": config_digest(loaded.model.config),
        **data.train.identity,
        "seq_len": data.train.seq_len,
        "document_mask": arguments.data.document_mask,
        "seed": arguments.training.seed,
        "global_batch_size": rows_per_step(arguments, world),
        **arguments.adapter.merge_identity(),
        **arguments.adapter.alignment_identity(),
        "full_rank_steps": arguments.adapter.full_rank_steps,
        "dtype": compute_dtype(ds_config),
        **({"optimizer": kind} if (kind := arguments.training.optimizer) != "adamw" else {}),
    }


def _check_checkpoint(checkpoint: Path | None, identity: dict[str, Any]) -> None:
    if checkpoint is not None:
        check_identity(checkpoint, TrainerState.read(checkpoint).identity, identity)
