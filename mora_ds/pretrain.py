"""The main job, from settings to a summary: every room below is wired here, and only here.

    settings -> output folder -> tokenizer -> token caches -> base -> squares -> engine -> (resume) -> Trainer.run -> export

What the user can get wrong is found in this order, cheapest first; nothing is trained before all of it has been.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds import zero
from mora_ds.adapter_files import BaseReference
from mora_ds.arguments import AdapterKind, Arguments, DataArguments, dump
from mora_ds.checkpoint import TrainerState, find_checkpoint, load_checkpoint, save_checkpoint
from mora_ds.data import (
    PackedDataset,
    TokenCache,
    build_cache,
    check_vocabulary,
    load_corpus,
    load_tokenizer,
    train_sentencepiece,
)
from mora_ds.ds_config import compute_dtype, fill_bucket_sizes, resolve_ds_config
from mora_ds.engine import initialize, initialize_full, start_distributed
from mora_ds.errors import UserError
from mora_ds.export import export_merged
from mora_ds.files import write_json_atomic
from mora_ds.injection import count_parameters, frozen_buffers, inject, mora_layers
from mora_ds.ledger import Ledger
from mora_ds.metrics import MetricsLog, peak_memory_bytes
from mora_ds.model import LoadedBase, create_base, load_base, read_model_config, resolve_folder
from mora_ds.ranks import Ranks
from mora_ds.remora import ReMoRA
from mora_ds.run_folder import claim, write_run_file
from mora_ds.saving import PROBE_TOKENS, RunWriter, save_full_model
from mora_ds.trainer import LoopSettings, Trainer
from mora_ds.validation import validate


def pretrain(arguments: Arguments) -> dict[str, Any]:
    """Run the job that `arguments` describe, on this rank of all ranks. Returns what `summary.json` holds.

    Raises `UserError` before anything expensive for what the user can mend, `RunError` for failures while running.
    """
    validate(arguments)
    start_distributed()
    ranks = Ranks.current()
    ds_config = resolve_ds_config(arguments.training.deepspeed, arguments.training.engine_settings(), ranks.world)
    folder = Path(arguments.training.output_dir)
    checkpoint = ranks.on_first(lambda: _claim(arguments, folder))
    say = print if ranks.is_first else _silence
    data = _load_data(arguments, ranks, folder, say)
    loaded = _load_base(arguments, ranks, folder, data.tokenizer, ds_config)
    if arguments.adapter.adapter == AdapterKind.FULL.value:
        job = _full_job(arguments, loaded, ds_config, data, say)
    else:
        job = _mora_job(arguments, loaded, ds_config, data, folder, ranks, say)
    return _train(arguments, job, data, folder, ranks, checkpoint)


@dataclass(frozen=True)
class _Data:
    tokenizer: Any
    tokenizer_folder: Path
    train: PackedDataset
    evaluation: dict[str, PackedDataset]


@dataclass(frozen=True)
class _Job:
    """An engine, and what a checkpoint and the report need of what it trains."""

    engine: zero.Engine
    remora: ReMoRA | None
    write_extras: Callable[[Path, int], None]
    finish: Callable[[Path], None]
    """Writes the merged model into a folder."""
    base_tensors: Mapping[str, Tensor]
    trainable_params: int
    total_params: int
    identity: dict[str, Any]


def _silence(*text: object) -> None:
    del text


def _claim(arguments: Arguments, folder: Path) -> Path | None:
    """The checkpoint to resume from, if any; the output folder is ready for this run afterwards."""
    training = arguments.training
    wanted = training.resume_from_checkpoint
    checkpoint = find_checkpoint(wanted, folder / "checkpoints", print) if wanted else None
    claim(folder, training.overwrite_output_dir, resume=wanted is not None)
    return checkpoint


# -- data ----------------------------------------------------------------------------------------------------------------


def _load_data(arguments: Arguments, ranks: Ranks, folder: Path, say: Callable[..., None]) -> _Data:
    data, model = arguments.data, arguments.model
    corpus = load_corpus(data.train_files, dataset_name=data.dataset_name, text_column=data.text_column)
    eval_corpora = {
        name: load_corpus([path], text_column=data.text_column, flag="--eval_files")
        for name, path in data.named_eval_files()
    }
    tokenizer = _tokenizer(arguments, ranks, folder, corpus)
    if model.model_config is None:
        _check_against_model(arguments, ranks, tokenizer)
    tokenizer_folder = folder / "tokenizer"
    ranks.on_first(lambda: tokenizer.save_pretrained(tokenizer_folder) and None)

    def cached(part: Any, name: str) -> TokenCache:
        say(f"tokens of {name}: {_cache_folder(data)}")
        return ranks.agree(
            lambda: build_cache(
                part,
                tokenizer,
                _cache_folder(data),
                num_proc=data.preprocessing_workers,
                is_builder=ranks.is_local_first,
                barrier=ranks.barrier,
                progress=ranks.is_first,
            )
        )

    training = arguments.training
    packed = PackedDataset(cached(corpus, "the training corpus"), data.seq_len, training.seed, data.document_mask)
    packed.check_batch_size(_rows_per_step(arguments, ranks.world))
    evaluation = {
        name: PackedDataset(cached(part, name), data.seq_len, 0, data.document_mask, shuffle=False)
        for name, part in eval_corpora.items()
    }
    return _Data(tokenizer, tokenizer_folder, packed, evaluation)


def _tokenizer(arguments: Arguments, ranks: Ranks, folder: Path, corpus: Any) -> Any:
    model = arguments.model
    if model.train_tokenizer_vocab:
        path = folder / "tokenizer" / "tokenizer.model"
        if not path.exists() or arguments.training.resume_from_checkpoint is None:
            texts = (document.text for document in corpus)
            ranks.on_first(lambda: train_sentencepiece(texts, model.train_tokenizer_vocab, path.parent))
        return load_tokenizer(path)
    if model.tokenizer_name is not None:
        return load_tokenizer(model.tokenizer_name, trust_remote_code=model.trust_remote_code)
    assert model.model_name_or_path is not None
    place = resolve_folder(model.model_name_or_path, ranks)
    return load_tokenizer(place, trust_remote_code=model.trust_remote_code, flag="--model_name_or_path")


def _check_against_model(arguments: Arguments, ranks: Ranks, tokenizer: Any) -> None:
    model = arguments.model
    assert model.model_name_or_path is not None
    config = read_model_config(resolve_folder(model.model_name_or_path, ranks) / "config.json")
    check_vocabulary(tokenizer, config.get_text_config().vocab_size)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and arguments.data.seq_len > longest:
        raise UserError(
            f"--seq_len {arguments.data.seq_len} is longer than the model's {longest} positions "
            "(max_position_embeddings in its config.json)"
        )


def _cache_folder(data: DataArguments) -> Path:
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mora_ds" / "tokens"


def _rows_per_step(arguments: Arguments, world: int) -> int:
    training = arguments.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * world


# -- model ---------------------------------------------------------------------------------------------------------------


def _load_base(
    arguments: Arguments, ranks: Ranks, folder: Path, tokenizer: Any, ds_config: dict[str, Any]
) -> LoadedBase:
    model = arguments.model
    own = folder / "base"
    if model.model_config is not None:
        config_file = Path(model.model_config)
        if arguments.training.resume_from_checkpoint is None or not (own / "config.json").exists():
            ranks.on_first(
                lambda: create_base(config_file, own, arguments.training.seed, tokenizer, len(tokenizer)) and None
            )
        place = own
    else:
        assert model.model_name_or_path is not None
        place = resolve_folder(model.model_name_or_path, ranks)
    dtype = getattr(torch, compute_dtype(ds_config))
    loaded = load_base(place, own, ranks, dtype, model.attn_implementation, model.trust_remote_code)
    training = arguments.training
    if training.gradient_checkpointing:
        reentrant = {"use_reentrant": training.gradient_checkpointing_reentrant}
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
        if training.gradient_checkpointing_reentrant:
            loaded.model.enable_input_require_grads()
    return loaded


def _mora_job(
    arguments: Arguments,
    loaded: LoadedBase,
    ds_config: dict[str, Any],
    data: _Data,
    folder: Path,
    ranks: Ranks,
    say: Callable[..., None],
) -> _Job:
    config = arguments.adapter.mora_config(arguments.training.seed)
    report = inject(loaded.model, config)
    say(report)
    fingerprint = ranks.on_first(loaded.base.fingerprint)
    ds_config = fill_bucket_sizes(ds_config, [parameter.numel() for parameter in loaded.model.parameters()])
    engine, *_ = initialize(model=loaded.model, config=ds_config)
    if ranks.is_local_first and not (folder / "ledger" / "ledger.json").exists():
        Ledger.create(folder / "ledger", fingerprint)
    ranks.barrier()
    ledger = Ledger.open(folder / "ledger", fingerprint)
    precision = arguments.adapter.merge_precision
    remora = ReMoRA(engine, config, ledger, loaded.base, loaded.keys, precision, ranks.is_local_first)
    reference = BaseReference(str(loaded.base.folder.resolve()), fingerprint, loaded.keys, compute_dtype(ds_config))
    probe = data.train.block(0)["input_ids"][:PROBE_TOKENS].unsqueeze(0)
    facts = {"operator": config.kind.value, "merge_precision": precision, "seq_len": data.train.seq_len}
    writer = RunWriter(engine, config, remora, reference, data.tokenizer_folder, probe, facts)

    def finish(target: Path) -> None:
        ranks.on_first(lambda: export_merged(folder / "checkpoints" / "latest", target, overwrite=True) and None)

    identity = {
        "base": fingerprint,
        "adapter": config.to_dict(),
        "merge_precision": precision,
        **_data_identity(arguments, data, ranks.world),
    }
    return _Job(
        engine, remora, writer.write, finish, frozen_buffers(loaded.model),
        report.trainable_params, report.total_params, identity,
    )  # fmt: skip


def _full_job(
    arguments: Arguments, loaded: LoadedBase, ds_config: dict[str, Any], data: _Data, say: Callable[..., None]
) -> _Job:
    total = count_parameters(loaded.model)
    say(f"full training, the control: all {total:,} parameters, sharded by ZeRO as ever")
    ds_config = fill_bucket_sizes(ds_config, [parameter.numel() for parameter in loaded.model.parameters()])
    engine, *_ = initialize_full(model=loaded.model, config=ds_config)
    world = torch.distributed.get_world_size()
    identity = {"adapter": {"kind": "full"}, **_data_identity(arguments, data, world)}
    return _Job(
        engine,
        None,
        lambda target, step: None,
        lambda target: save_full_model(engine, target, data.tokenizer),
        {},
        total,
        total,
        identity,
    )


def _data_identity(arguments: Arguments, data: _Data, world: int) -> dict[str, Any]:
    """What must not change in mid-run for the batches to follow on."""
    return {
        "tokens": data.train.blocks.cache.folder.name,
        "seq_len": data.train.seq_len,
        "document_mask": arguments.data.document_mask,
        "seed": arguments.training.seed,
        "global_batch_size": _rows_per_step(arguments, world),
        "merge_every": arguments.adapter.merge_every,
    }


# -- the run -------------------------------------------------------------------------------------------------------------


def _train(
    arguments: Arguments, job: _Job, data: _Data, folder: Path, ranks: Ranks, checkpoint: Path | None
) -> dict[str, Any]:
    steps = _total_steps(arguments, data.train, ranks.world)
    state = TrainerState(world_size=ranks.world, identity=job.identity)
    if checkpoint is not None:
        state = _resume(job, checkpoint, ranks)
    elif job.remora is not None:
        ranks.on_first(lambda: job.remora.ledger.truncate(0) if job.remora else None)
        job.remora.reopen()
    if ranks.is_first:
        resolved = {"world_size": ranks.world, "steps": steps, "deepspeed": job.engine.config}
        write_run_file(folder, dump(arguments), resolved)
    log = MetricsLog(folder, steps, ranks.is_first, state.step)
    counter = zero.CollectiveCounter(job.base_tensors.values())
    root = folder / "checkpoints"

    def save(now: TrainerState) -> Path:
        extras = lambda target: job.write_extras(target, now.step)  # noqa: E731
        return save_checkpoint(root, job.engine, now, extras, arguments.training.save_total_limit)

    trainer = Trainer(
        engine=job.engine,
        train_data=data.train,
        eval_data=data.evaluation,
        schedule=arguments.schedule(steps),
        settings=_loop_settings(arguments, steps),
        log=log,
        counter=counter,
        state=state,
        save=save,
        merger=job.remora,
    )
    trainer.last_checkpoint = checkpoint
    state = trainer.run()
    summary = _summary(job, state, trainer, counter)
    if ranks.is_first:
        write_json_atomic(folder / "summary.json", summary)
    if arguments.training.export_merged:
        log.say(f"writing the merged model to {folder / 'merged'}")
        job.finish(folder / "merged")
    log.close()
    ranks.barrier()
    return summary


def _resume(job: _Job, checkpoint: Path, ranks: Ranks) -> TrainerState:
    state = load_checkpoint(checkpoint, job.engine, job.identity)
    if job.remora is not None:
        if ranks.is_local_first:
            Ledger.open(checkpoint / "ledger", job.remora.ledger.base_fingerprint).copy_to(job.remora.ledger.folder)
        ranks.barrier()
        job.remora.reopen()
        job.remora.replay()
    return state


def _total_steps(arguments: Arguments, data: PackedDataset, world: int) -> int:
    training = arguments.training
    if training.max_steps > 0:
        return training.max_steps
    return max(1, math.ceil(training.num_train_epochs * data.n_blocks / _rows_per_step(arguments, world)))


def _loop_settings(arguments: Arguments, steps: int) -> LoopSettings:
    training = arguments.training
    return LoopSettings(
        total_steps=steps,
        micro_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        eval_batch_size=training.per_device_eval_batch_size,
        logging_steps=training.logging_steps,
        eval_steps=training.eval_steps,
        eval_on_start=training.eval_on_start,
        max_eval_batches=training.max_eval_batches,
        save_steps=training.save_steps,
        merge_at_end=arguments.adapter.merge_at_end,
    )


def _summary(job: _Job, state: TrainerState, trainer: Trainer, counter: zero.CollectiveCounter) -> dict[str, Any]:
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "trainable_params": job.trainable_params,
        "total_params": job.total_params,
        "merges": len(state.merges),
        "perplexity_before": state.perplexity_before,
        "perplexity_after": state.perplexity_last,
        "bytes_gathered_per_step": trainer.bytes_gathered_per_step,
        "base_bytes_gathered": counter.base_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
    }
