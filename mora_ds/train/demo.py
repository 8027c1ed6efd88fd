"""The embedded default: what runs when neither model nor text is named. No network, nothing but Python's own text.

prose (language reference, docstrings) + code (the standard library)      written out of the running Python
-> a SentencePiece tokenizer -> a small Llama, warm-started full-rank on the prose
-> continued on the code with MoRA and merges                             the job proper, the same as on 64 GPUs
-> a table: what was learned, what was kept, what crossed the wire; one continuation by the merged model
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mora_ds.checkpoint.layout import MERGED_FOLDER, TOKENIZER_FOLDER
from mora_ds.config.arguments import Arguments, from_flat
from mora_ds.config.validate import validate
from mora_ds.data import load_corpus, load_tokenizer, train_sentencepiece, write_embedded
from mora_ds.engine.ds_config import resolve_ds_config
from mora_ds.engine.initialize import start_distributed
from mora_ds.models.load import create_base
from mora_ds.parallel.topology import check_degree
from mora_ds.parallel.ulysses_checks import check_world
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.dry_run import dry_run
from mora_ds.train.output_folder import reserve
from mora_ds.train.pretrain import pretrain
from mora_ds.train.warm_start import run_job

MODEL_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "models" / "tiny_llama.json"
VOCABULARY = 2048
PROSE_BYTES, CODE_BYTES, EVAL_BYTES = 1_700_000, 2_500_000, 60_000

_SHARED: dict[str, Any] = {"seq_len": 128, "per_device_eval_batch_size": 16, "gradient_accumulation_steps": 1}
WARM_START: dict[str, Any] = {
    **_SHARED,
    "adapter": "full",
    "max_steps": 420,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "min_lr_ratio": 0.1,
    "warmup_steps": 20,
    "weight_decay": 0.01,
    "logging_steps": 30,
    "eval_on_start": False,
    "export_merged": True,
}
CONTINUE: dict[str, Any] = {
    **_SHARED,
    "mora_rank": 8,
    "operator": "rotate",
    "max_steps": 360,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "min_lr_ratio": 0.1,
    "warmup_steps": 10,
    "merge_every": 90,
    "restart_warmup_steps": 5,
    "logging_steps": 30,
    "eval_steps": 180,
    "save_steps": 180,
    "export_merged": True,
}
ROWS_PER_STEP = 8
"""Global batch size, in sequences, shared out over the ranks."""
PROMPT = "def "


def run_demo(arguments: Arguments) -> None:
    """Run the embedded default on all ranks. Flags that the user gave hold for the second part, the job proper.

    Raises `UserError` as `pretrain` does, and where this Python comes without its own sources.
    """
    training = arguments.training
    if training.dry_run:
        _plan(arguments)
        return
    start_distributed(timeout_s=training.collective_timeout_s, silence_s=training.heartbeat_timeout_s)
    ranks = Ranks.current()
    started = time.monotonic()
    folder = Path(arguments.training.output_dir)
    check_world(training.sequence_parallel_size, ranks.world)
    check_degree(training.tensor_parallel_size, ranks.world)
    replicas = ranks.world // training.ranks_per_replica
    paths = DemoPaths(folder / "demo")
    job = _continue_arguments(arguments, paths, max(1, ROWS_PER_STEP // replicas))
    validate(job)
    resolve_ds_config(job.training.deepspeed, job.training.engine_settings(), replicas)
    ranks.on_first(lambda: _prepare(arguments, folder))
    if not paths.warm.is_dir():
        training = arguments.training
        rows = max(1, ROWS_PER_STEP // (ranks.world // training.sequence_parallel_size))
        warm = {**warm_start_settings(paths, rows, training.seed), "deepspeed": training.deepspeed}
        warm["sequence_parallel_size"] = training.sequence_parallel_size
        _say(ranks, f"\n1. warm start: every parameter trained on prose for {WARM_START['max_steps']} steps")
        sharded = pretrain(from_flat(warm))
    else:
        sharded = None
    _say(ranks, "\n2. the job proper: continued on code with MoRA, the base frozen and whole on every rank")
    summary = run_job(job)
    if ranks.is_first:
        _report(folder, summary, sharded, ranks.world, time.monotonic() - started)
    ranks.barrier()


def _plan(arguments: Arguments) -> None:
    """--dry_run: of the job proper; the small model's config stands for the one that the warm start would make."""
    if arguments.model.model_config is not None:
        validate(arguments)
        dry_run(arguments)
        return
    replicas = max(1, int(os.environ.get("WORLD_SIZE", "1")) // arguments.training.ranks_per_replica)
    paths = DemoPaths(Path(arguments.training.output_dir) / "demo")
    job = _continue_arguments(arguments, paths, max(1, ROWS_PER_STEP // replicas))
    validate(job)
    dry_run(dataclasses.replace(job, model=dataclasses.replace(job.model, model_name_or_path=str(MODEL_CONFIG))))


@dataclasses.dataclass(frozen=True)
class DemoPaths:
    """Where the demonstration keeps what it starts from."""

    root: Path

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def start(self) -> Path:
        return self.root / "start"

    @property
    def warm(self) -> Path:
        return self.root / "warm_start" / MERGED_FOLDER

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    def train_files(self, domain: str) -> list[str]:
        """`domain`: general (prose) or domain (code)."""
        return [str(self.corpus / f"{domain}_train.jsonl")]

    @property
    def eval_files(self) -> list[str]:
        named = (("prose", "general"), ("code", "domain"))
        return [f"{name}={self.corpus / f'{stem}_eval.jsonl'}" for name, stem in named]


def warm_start_settings(paths: DemoPaths, rows: int, seed: int) -> dict[str, Any]:
    """Settings of the run that makes `paths.warm` of `paths.start`. `rows`: sequences a rank and step."""
    return {
        **WARM_START,
        "per_device_train_batch_size": rows,
        "model_name_or_path": str(paths.start),
        "train_files": paths.train_files("general"),
        "eval_files": paths.eval_files[:1],
        "output_dir": str(paths.warm.parent),
        "overwrite_output_dir": True,
        "cache_dir": str(paths.tokens),
        "seed": seed,
    }


def _say(ranks: Ranks, text: str) -> None:
    if ranks.is_first:
        print(text, flush=True)


def _prepare(arguments: Arguments, folder: Path) -> None:
    """Corpora, tokenizer and the untrained model, unless a resumed run has them already."""
    training = arguments.training
    paths = DemoPaths(folder / "demo")
    reserve(folder, training.overwrite_output_dir, resume=training.resume_from_checkpoint is not None).rollback()
    print(
        "No --model_name_or_path and no --train_files: running the embedded default.\n"
        "  general text: Python's language reference and docstrings;  new domain: the standard library's code\n"
        f"  everything is made here, without a network, and written to {folder}/"
    )
    if training.resume_from_checkpoint is not None and paths.warm.is_dir():
        return
    write_inputs(paths, training.seed)


def write_inputs(paths: DemoPaths, seed: int) -> None:
    """Corpora, a tokenizer and an untrained model, in place of what `paths` held."""
    if paths.root.exists():
        shutil.rmtree(paths.root)
    written = write_embedded(paths.corpus, general_bytes=PROSE_BYTES, domain_bytes=CODE_BYTES, eval_bytes=EVAL_BYTES)
    print("  corpora: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in written.text_bytes.items()))
    corpus = load_corpus([str(written.general_train), str(written.domain_train)])
    tokenizer = load_tokenizer(train_sentencepiece(corpus.texts(), VOCABULARY, paths.root / TOKENIZER_FOLDER))
    print(f"  tokenizer: SentencePiece, {len(tokenizer)} pieces, trained on both")
    create_base(MODEL_CONFIG, paths.start, seed, tokenizer, len(tokenizer))


def _continue_arguments(arguments: Arguments, paths: DemoPaths, rows: int) -> Arguments:
    ours = {
        **CONTINUE,
        "per_device_train_batch_size": rows,
        "model_name_or_path": str(paths.warm),
        "train_files": paths.train_files("domain"),
        "eval_files": paths.eval_files,
        "cache_dir": str(paths.tokens),
    }
    return from_flat({**ours, **_given(arguments)})


def _given(arguments: Arguments) -> dict[str, Any]:
    groups = (arguments.model, arguments.adapter, arguments.data, arguments.training)
    return {key: value for group in groups for key, value in vars(group).items() if key in arguments.given}


# -- the report ----------------------------------------------------------------------------------------------------


def _report(folder: Path, summary: dict[str, Any], sharded: dict[str, Any] | None, world: int, seconds: float) -> None:
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    share = 100 * summary["trainable_params"] / summary["total_params"]
    rows = [("", "before", "after", "change")]
    for name in after:
        change = 100 * (after[name] / before[name] - 1) if name in before else float("nan")
        rows.append(
            (f"perplexity on {name}", f"{before.get(name, float('nan')):.2f}", f"{after[name]:.2f}", f"{change:+.1f}%")
        )
    print("\n" + "\n".join(f"{row[0]:<24}{row[1]:>12}{row[2]:>12}{row[3]:>10}" for row in rows))
    facts = [
        ("trained", f"{summary['trainable_params']:,} of {summary['total_params']:,} parameters ({share:.2f}%), "
                    f"{summary['merges']} merges in {summary['steps']} steps"),
        ("gathered a step, rank", _gathered(summary, sharded, world)),
        ("bytes of the base", f"{summary['base_bytes_gathered']} in all collectives of the run"),
        ("time", f"{seconds:.0f} s on {world} rank(s)"),
        ("curves", f"tensorboard --logdir {folder / 'tensorboard'}   (numbers: {folder / 'metrics.jsonl'})"),
    ]  # fmt: skip
    merged = folder / MERGED_FOLDER
    if merged.is_dir():
        facts.append(("merged model", f"{merged}   (plain transformers loads it)"))
    print("\n".join(f"{name:<24}{fact}" for name, fact in facts))
    if merged.is_dir():
        print(f"\nthe merged model goes on from {PROMPT!r}:\n" + _indent(sample(merged, PROMPT)))


def _gathered(summary: dict[str, Any], sharded: dict[str, Any] | None, world: int) -> str:
    if world == 1:
        squares, everything = 4 * summary["trainable_params"], 4 * summary["total_params"]
        return (
            f"nothing, there is one; with more ranks the squares, {squares / 1e6:.2f} MB, "
            f"where ZeRO-3 with a sharded base gathers {everything / 1e6:.2f} MB"
        )
    mine = f"{summary['bytes_gathered_per_step'] / 1e6:.2f} MB: the squares"
    if sharded is None:
        return mine
    return f"{mine} (ZeRO-3 with the base sharded, in part 1: {sharded['bytes_gathered_per_step'] / 1e6:.2f} MB)"


def sample(folder: Path, prompt: str, tokens: int = 60, seed: int = 0) -> str:
    """A sampled continuation by a Hugging Face folder, loaded with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=40)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
