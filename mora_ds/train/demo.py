"""The demo, which runs if neither a model nor text is named.

    prose (language reference, docstrings) + code (the standard library)      written from the running Python
    -> a SentencePiece tokenizer -> a small Llama, warm-started full-rank on the prose
    -> trained further on the code, with embeddings and merges                the main job, the same as on 64 GPUs
       (MoRA matrices with Muon, a separate learning rate for embeddings, 10% of every batch from the prose)
    -> a table of learning, forgetting and communication

It needs no network: all text comes with Python.
"""

import logging
from pathlib import Path

from mora_ds.adapters.registry import DEFAULT_ADAPTER
from mora_ds.checkpoint.layout import MERGED_FOLDER, TOKENIZER_FOLDER
from mora_ds.common.errors import UserError, validation_errors_of
from mora_ds.common.files import CONFIGS, JsonObject
from mora_ds.common.untrusted import expanded
from mora_ds.config.arguments import Arguments, dump, from_flat, with_flags
from mora_ds.config.flags import Settings
from mora_ds.config.training import TrainingArguments
from mora_ds.config.validate import validate
from mora_ds.data import (
    load_corpus,
    load_tokenizer,
    train_sentencepiece,
    write_demo_corpus,
)
from mora_ds.models.load import create_base
from mora_ds.runtime.nodes import write_on_rank0
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.output_folder import DEMO, abandon, reserve
from mora_ds.train.pretrain import pretrain
from mora_ds.train.setup import engine_config
from mora_ds.train.start_up import start_up

logger = logging.getLogger(__name__)

MODEL_CONFIG = CONFIGS / "models" / "tiny_llama.json"
VOCABULARY = 2048
PROSE_BYTES = 1_700_000
CODE_BYTES = 2_500_000
EVAL_BYTES = 60_000

_SHARED: Settings = {
    "seq_len": 128,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "min_lr_ratio": 0.1,
    "logging_steps": 30,
    "export_merged": True,
}
WARM_START: Settings = {
    **_SHARED,
    "adapter": "full",
    "max_steps": 420,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "weight_decay": 0.01,
    "eval_on_start": False,
}
CONTINUE: Settings = {
    **_SHARED,
    "mora_rank": 8,
    "operator": "rotate",
    "max_steps": 360,
    "learning_rate": 4e-3,
    "warmup_steps": 10,
    "merge_every": 90,
    "restart_warmup_steps": 5,
    "eval_steps": 180,
    "save_steps": 180,
}
RECIPE: Settings = {
    "optimizer": "muon",
    "learning_rate": 0.03,
    "train_embeddings": True,
    "embedding_learning_rate": 3e-3,
}
"""Additions of configs/recipes/continual_embeddings.yaml, with learning rates for a
small model."""
REPLAY = 0.1
"""Fraction of every batch that is old text."""
GLOBAL_BATCH_SIZE = 8
"""In sequences, over all ranks."""


def run_demo(arguments: Arguments, ranks: Ranks) -> None:
    """Run the demo on all `ranks`. The user's flags apply to its second part, the main
    job. Raises `UserError` as `pretrain` does, and if this Python has no sources of its
    standard library."""
    training = arguments.training
    folder = expanded(training.output_dir, "--output_dir")
    paths = DemoPaths(folder / DEMO)
    with start_up():
        # Check the settings of the main job before anything is written.
        job = continue_arguments(arguments, paths, ranks.world)
    sharded = None
    try:
        write_on_rank0(
            ranks,
            "files of the demo",
            paths.root,
            lambda: _prepare(job.training, folder, paths),
        )
        if not ranks.run_on_rank0("warm start of the demo", paths.warm.is_dir):
            replicas = ranks.world // training.sequence_parallel_size
            batch_size = max(1, GLOBAL_BATCH_SIZE // replicas)
            warm = warm_start_settings(paths, batch_size, training.seed)
            warm["deepspeed"] = training.deepspeed
            warm["sequence_parallel_size"] = training.sequence_parallel_size
            warm["attn_implementation"] = arguments.model.attn_implementation
            first_part = from_flat(warm)
            validate(first_part)
            logger.info(
                f"\n1. warm start: all parameters are trained on prose for {WARM_START['max_steps']} steps"
            )
            sharded = pretrain(first_part, ranks)
            write_on_rank0(ranks, "base of the demo", paths.warm, lambda: None)
        logger.info(
            "\n2. the main job: MoRA trains on code; the base is frozen and unsharded on every GPU"
        )
        summary = pretrain(job, ranks)
    # Remove the folder again if the main job does not start.
    except BaseException:
        if ranks.is_rank0:
            abandon(folder)
        raise
    if ranks.is_rank0:
        _report(folder, summary, sharded)
    ranks.barrier("end of the demo")


class DemoPaths:
    """Paths of the demo's inputs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corpus = root / "corpus"
        self.tokens = root / "tokens"
        self.start = root / "start"
        """The untrained model."""
        self.warm = root / "warm_start" / MERGED_FOLDER
        """The model after the warm start: the base of the demo's main job."""
        prose = self.corpus / "general_eval.jsonl"
        code = self.corpus / "domain_eval.jsonl"
        self.eval_files = [f"prose={prose}", f"code={code}"]

    def train_file(self, text: str) -> str:
        """`text`: "general" (prose) or "domain" (code)."""
        return str(self.corpus / f"{text}_train.jsonl")


def warm_start_settings(paths: DemoPaths, batch_size: int, seed: int) -> Settings:
    """Settings of the run that makes `paths.warm` from `paths.start`. `batch_size`:
    sequences per rank and step."""
    return {
        **WARM_START,
        "per_device_train_batch_size": batch_size,
        "model_name_or_path": str(paths.start),
        "train_files": [paths.train_file("general")],
        "eval_files": paths.eval_files[:1],
        "output_dir": str(paths.warm.parent),
        "overwrite_output_dir": True,
        "cache_dir": str(paths.tokens),
        "seed": seed,
    }


def _prepare(training: TrainingArguments, folder: Path, paths: DemoPaths) -> None:
    """Reserve the folder; unless the run resumes, write corpora, tokenizer and
    untrained model."""
    resumes = training.resume_from_checkpoint is not None
    reserve(folder).prepare(
        training.overwrite_output_dir, resumes, training.export_merged
    )
    logger.info(
        "No --model_name_or_path and no --train_files: running the demo.\n"
        "  general text: Python's language reference and docstrings;  new domain: the standard library's code\n"
        f"  everything is created on this machine, without a network, and written to {folder}/"
    )
    if not paths.root.exists():
        write_inputs(paths, training.seed)
    elif not paths.warm.is_dir():
        raise UserError(
            f"{paths.warm}, the base of the demo, is missing: restart the demo with --overwrite_output_dir"
        )


def write_inputs(paths: DemoPaths, seed: int, config: Path = MODEL_CONFIG) -> None:
    """Write corpora, a tokenizer and an untrained model of `config` to `paths`."""
    write_demo_corpus(paths.corpus, PROSE_BYTES, CODE_BYTES, EVAL_BYTES)
    corpus = load_corpus([paths.train_file("general"), paths.train_file("domain")])
    folder = train_sentencepiece(
        corpus.texts(), VOCABULARY, paths.root / TOKENIZER_FOLDER
    )
    tokenizer = load_tokenizer(folder)
    create_base(config, paths.start, seed, tokenizer, len(tokenizer))


def continue_arguments(arguments: Arguments, paths: DemoPaths, world: int) -> Arguments:
    """The settings of the main job: the demo's, overridden by the user's. Raises
    `UserError`."""
    user_settings = {
        name: value
        for name, value in dump(arguments).items()
        if name in arguments.set_by_user
    }
    replicas = max(1, world // arguments.training.ranks_per_replica)
    settings = {
        **CONTINUE,
        "per_device_train_batch_size": max(1, GLOBAL_BATCH_SIZE // replicas),
        "model_name_or_path": str(paths.warm),
        "train_files": [paths.train_file("domain")],
        "eval_files": paths.eval_files,
        "cache_dir": str(paths.tokens),
    }
    # The recipe's learning rates are for MoRA matrices with Muon.
    is_mora = arguments.adapter.adapter == DEFAULT_ADAPTER
    chooses_optimizer = "optimizer" in arguments.set_by_user
    if is_mora and not chooses_optimizer and not arguments.research:
        replay = f"general={paths.train_file('general')}:{REPLAY}"
        recipe = {**settings, **RECIPE, "replay": [replay]}
        job = with_flags(recipe, user_settings)
        if not (reasons := validation_errors_of(_check, job, world)):
            return job
        logger.info(
            f"The demo trains only MoRA matrices, with AdamW, because its recipe does not run here: {reasons[0]}"
        )
    job = with_flags(settings, user_settings)
    _check(job, world)
    return job


def _check(job: Arguments, world: int) -> None:
    validate(job)
    engine_config(job.training, job.adapter.adapter, world)


# -- the report ------------------------------------------------------------------------


def _report(folder: Path, summary: JsonObject, sharded: JsonObject | None) -> None:
    """Log the results as a table. `sharded`: the summary of the warm start, which
    sharded its base."""
    before = summary["perplexity_before"]
    volume = f"{summary['bytes_gathered_per_step'] / 1e6:.2f} MB: what is trained"
    if sharded is not None:
        with_base = sharded["bytes_gathered_per_step"] / 1e6
        volume += f" (with the base sharded: {with_base:.2f} MB)"
    logger.info(f"\n{'':<24}{'before':>12}{'after':>12}{'change':>10}")
    for name, after in summary["perplexity_after"].items():
        start = before.get(name, float("nan"))
        percent = 100 * (after / start - 1)
        label = f"perplexity on {name}"
        logger.info(f"{label:<24}{start:>12.2f}{after:>12.2f}{percent:>+9.1f}%")
    parameters = f"{summary['trainable_params']:,} of {summary['total_params']:,}"
    fraction = summary["trainable_params"] / summary["total_params"]
    merges = f"{summary['merges']} merges in {summary['steps']} steps"
    logger.info(f"{'trained':<24}{parameters} ({fraction:.2%}), {merges}")
    logger.info(f"{'all-gather a step':<24}{volume}")
    logger.info(
        f"{'bytes of the base':<24}{summary['base_bytes_gathered']} in all collectives of the run"
    )
    merged = folder / MERGED_FOLDER
    if merged.is_dir():
        logger.info(f"{'merged model':<24}{merged}   (plain transformers loads it)")
