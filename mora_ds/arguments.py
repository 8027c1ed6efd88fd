"""All settings of a training run: four dataclasses, parsed strictly, dumped beside the run.

    [recipe.yaml] --flags -> parse -> Arguments -> validation.validate -> typed fields for the rooms below
                                          \\-> dump -> run.yaml

Flag names are Hugging Face's where it has one. `dump` writes what `parse` reads: the `run.yaml` of a run is a recipe.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from mora_ds.config import AdapterConfig, LoRAConfig, MoRAConfig
from mora_ds.ds_config import EngineSettings
from mora_ds.ds_optimizer import OptimizerKind
from mora_ds.errors import member_named
from mora_ds.flags import documented, parse_flat
from mora_ds.resets import OptimizerReset
from mora_ds.schedules import MergeWhen, Schedule, schedule_kind
from mora_ds.stall import DEFAULT_TOLERANCE, StallRule, StallSignal

RECORDED_KEYS = ("versions", "resolved")
"""Top-level keys under which `run.yaml` may record facts that are no settings; a recipe may carry them unread."""


class AdapterKind(str, Enum):
    """What is trained."""

    MORA = "mora"
    LORA = "lora"
    FULL = "full"
    NONE = "none"

    @property
    def is_merged(self) -> bool:
        """Whether it is something beside a frozen base, that can be merged into it."""
        return self in (AdapterKind.MORA, AdapterKind.LORA)


class MergePrecision(str, Enum):
    """How a merge forms the live weight."""

    EXACT = "exact"
    INCREMENTAL = "incremental"


class TPGrouping(str, Enum):
    """What squares of split layers cost on the wire."""

    GATHER = "gather"
    ALIGNED = "aligned"


@dataclass(frozen=True)
@documented
class ModelArguments:
    """Which model, and which tokenizer."""

    model_name_or_path: str | None = None
    """Folder or hub name of the model to go on training. Without it and without data: the embedded default."""
    model_config: str | None = None
    """A config.json (see configs/models/) to start from random weights instead of --model_name_or_path."""
    tokenizer_name: str | None = None
    """Folder, hub name or SentencePiece .model file of the tokenizer. Default: the model's own."""
    train_tokenizer_vocab: int = 0
    """Train a SentencePiece tokenizer of this many pieces on the training files; 0 for none."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model."""
    attn_implementation: str = "auto"
    """auto (sdpa where the model has it), sdpa, eager, flash_attention_2 and so on, as in transformers."""


@dataclass(frozen=True)
@documented
class AdapterArguments:
    """What is trained, and when it is merged."""

    adapter: str = AdapterKind.MORA.value
    """mora (squares), or one of the controls: lora (with --merge_every: ReLoRA), full (every parameter, under plain
    ZeRO), none (nothing: the base is evaluated)."""
    mora_rank: int = 8
    """LoRA rank whose parameter count each square matches: r_hat = floor(sqrt((d_in + d_out) * mora_rank))."""
    lora_rank: int | None = None
    """Rank of --adapter lora. Default: --mora_rank, for as many trainable parameters."""
    lora_alpha: float | None = None
    """LoRA's update is lora_alpha / lora_rank times B A. Default: twice the rank."""
    operator: str = "auto"
    """truncate, share, decouple or rotate. auto: rotate for ranks below 64, share from there on."""
    grouping: str = "permuted"
    """permuted (fresh permutations every cycle), alternate (the paper's strided, contiguous, strided, ... for share),
    plain, or one of share's own: strided, contiguous, contiguous-strided, strided-contiguous."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that are adapted: names, globs, regular expressions after re:, or all-linear (all but the head)."""
    compute: str = "auto"
    """activation (passes over the activations), weight (passes over the weight: faster from about as many tokens a
    micro-batch as the layer is wide, but rounds small deltas in bf16) or auto (weight in fp32 where it is faster)."""
    tp_grouping: str = TPGrouping.GATHER.value
    """gather (any grouping; ranks of a tensor-parallel group gather a square to use it) or aligned (share's groupings,
    confined to --tp_segments segments where the model's plan splits a layer: its square is never communicated)."""
    tp_segments: int = 8
    """Segments of --tp_grouping aligned; --tensor_parallel_size must divide it. The result hangs on it, at any size."""
    mora_dropout: float = 0.0
    """Dropout on the adapter's input, at least 0 and below 1."""
    train_embeddings: bool = False
    """Train the input embeddings too (sharded by ZeRO like the squares)."""
    train_norms: bool = False
    """Train the norms too."""
    train_head: bool = False
    """Train the output head too."""
    merge_every: int = 0
    """ReMoRA: optimizer steps from one merge to the next; 0 for none. With --merge_when stalled: steps of the shortest
    cycle, 0 for as short as the ramp and --stall_window allow."""
    merge_when: str = MergeWhen.STEPS.value
    """steps (every --merge_every steps) or stalled (when --stall_signal has flattened)."""
    stall_signal: str = StallSignal.LOSS.value
    """What must flatten: loss (the training loss) or update (the norm of all squares, which start a cycle at 0)."""
    stall_window: int = 200
    """Optimizer steps at full rate over which it must be flat; the noisier the loss, the longer."""
    stall_tolerance: float | None = None
    """Flat is what moves by less than this share of itself over the window, two standard errors of a straight line
    included. Default: 0.01 for loss, 0.05 for update."""
    merge_at_latest: int = 0
    """With --merge_when stalled: merge a cycle of this many steps even if nothing has stalled; 0 for no limit."""
    restart_warmup_steps: int = 10
    """Optimizer steps over which the rate climbs back after a merge (the paper: 50 of 2000)."""
    optimizer_reset: str = OptimizerReset.ZERO.value
    """What a merge does to the optimizer's state: zero (moments and step count), magnitude (zeroes the smallest 90% of
    each moment), random (a random 99%), or keep."""
    merge_precision: str = MergePrecision.EXACT.value
    """exact (original weight + all squares so far, summed in fp32, rounded once) or incremental (live weight + the
    newest square, rounded at each merge; needs no original weights)."""
    full_rank_steps: int = 0
    """Train every parameter for the first so many of the run's steps, under plain ZeRO, and adapt the model that comes
    of it in the rest: ReLoRA's full-rank warm start. It is written to OUTPUT_DIR/full_rank."""
    full_rank_learning_rate: float | None = None
    """Peak rate of those steps. Default: a tenth of --learning_rate."""
    merge_at_end: bool = False
    """Merge once more after the last step, so that the run ends with squares of zero."""

    def stall_rule(self) -> StallRule | None:
        """What decides about merges with --merge_when stalled. Raises `UserError` for settings that make no rule."""
        if self.merge_when != MergeWhen.STALLED.value:
            return None
        signal = member_named(StallSignal, "stall_signal", self.stall_signal)
        tolerance = DEFAULT_TOLERANCE[signal] if self.stall_tolerance is None else self.stall_tolerance
        return StallRule(signal, self.stall_window, tolerance)

    def merge_identity(self) -> dict[str, Any]:
        """What must not change in mid-run for merges to come when they would have come."""
        rule, identity = self.stall_rule(), {"merge_every": self.merge_every}
        if rule is None:
            return identity  # the same as before there were other rules: old checkpoints still resume
        stalled = {"stall_signal": rule.signal.value, "stall_window": rule.window, "stall_tolerance": rule.tolerance}
        return {**identity, "merge_when": self.merge_when, "merge_at_latest": self.merge_at_latest, **stalled}

    def config(self, seed: int) -> AdapterConfig:
        """These settings as the adapter's own config."""
        common: dict[str, Any] = {
            "target_modules": tuple(self.target_modules),
            "dropout": self.mora_dropout,
            "train_embeddings": self.train_embeddings,
            "train_norms": self.train_norms,
            "train_head": self.train_head,
            "seed": seed,
        }
        if self.adapter == AdapterKind.LORA.value:
            rank = self.mora_rank if self.lora_rank is None else self.lora_rank
            return LoRAConfig(rank=rank, alpha=self.lora_alpha, **common)
        return MoRAConfig(
            rank=self.mora_rank,
            operator=self.operator,
            grouping=self.grouping,
            compute=self.compute,
            segments=self.tp_segments if self.tp_grouping == TPGrouping.ALIGNED.value else 0,
            **common,
        )


@dataclass(frozen=True)
@documented
class DataArguments:
    """What is read, and how it becomes batches."""

    train_files: list[str] = field(default_factory=list)
    """Files or patterns to train on: text, JSON lines, Parquet, Arrow. Quote patterns: 'corpus/*.jsonl'."""
    eval_files: list[str] = field(default_factory=list)
    """Files or patterns whose perplexity is reported, each as PATH (named by its stem) or NAME=PATH."""
    dataset_name: str | None = None
    """Name or folder of a `datasets` data set to train on, instead of --train_files."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    seq_len: int = 512
    """Tokens of one packed training sequence."""
    document_mask: bool = True
    """Restart positions at every document and keep attention inside it; --no_document_mask lets it cross."""
    preprocessing_workers: int = 1
    """Processes that tokenise, on each node."""
    cache_dir: str | None = None
    """Folder of the token cache. Default: one in the user's cache folder."""

    def named_eval_files(self) -> list[tuple[str, str]]:
        """(name, path or pattern) of each evaluation set."""
        pairs = [entry.partition("=") for entry in self.eval_files]
        named = [(name, path) if mark and "/" not in name else (None, name + mark + path) for name, mark, path in pairs]
        return [(name or Path(path).stem, path) for name, path in named]


@dataclass(frozen=True)
@documented
class TrainingArguments:
    """The run itself."""

    output_dir: str = "out"
    """Folder that receives everything the run writes."""
    overwrite_output_dir: bool = False
    """Delete the run that --output_dir holds."""
    resume_from_checkpoint: str | None = None
    """latest (fails without one), auto (starts afresh without one), or the path of a checkpoint."""
    deepspeed: str | None = None
    """DeepSpeed's JSON file, such as configs/zero3.json. Default: ZeRO-3 with every value "auto"."""
    tensor_parallel_size: int = 1
    """Ranks that share the work of one: each computes a slice of every layer and holds a share of every square; the
    base stays whole on each. Consecutive ranks, best of one node. Ranks of the run = this x data-parallel replicas."""
    dry_run: bool = False
    """Print what each rank would compute and store, and stop: nothing is trained, the output folder stays as it is."""
    max_steps: int = -1
    """Optimizer steps of the run; -1: --num_train_epochs decides."""
    num_train_epochs: float = 1.0
    """Passes over the data, where --max_steps is -1."""
    per_device_train_batch_size: int = 8
    """Sequences per rank and micro-batch."""
    per_device_eval_batch_size: int = 8
    """Sequences per rank in evaluation."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    sequence_parallel_size: int = 1
    """Consecutive ranks that share every row, each with its part of the tokens (DeepSpeed's Ulysses), for sequences
    too long for one; the base stays whole on every rank. Batch sizes then count the rows of such a group."""
    optimizer: str = OptimizerKind.ADAMW.value
    """adamw, or muon: DeepSpeed's Muon on the squares, AdamW on whatever else is trained."""
    learning_rate: float = 4e-4
    """Peak rate (the paper, 7B: 4e-4 to 5e-4 at rank 8, 5e-5 to 7e-5 at rank 256)."""
    min_lr_ratio: float = 0.0
    """The rate falls towards this share of the peak."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant (constant_with_warmup is the same) or warmup_stable_decay (wsd)."""
    decay_ratio: float = 0.2
    """Share of the steps after the first warm-up in which warmup_stable_decay falls."""
    warmup_steps: int = 0
    """Optimizer steps of the first warm-up."""
    warmup_ratio: float = 0.0
    """The same as a share of the run, where --warmup_steps is 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, AdamW's and Muon's."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Adam's epsilon."""
    muon_learning_rate: float = 0.03
    """Peak rate of the squares under --optimizer muon; --learning_rate is then that of AdamW's half. Every update of a
    square has about this spectral norm, whatever the gradient."""
    muon_momentum: float = 0.95
    """Muon's decay of the momentum."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 for no clipping."""
    bf16: bool = False
    """Compute in bfloat16; masters of what is trained stay in fp32."""
    fp16: bool = False
    """Compute in float16 with loss scaling."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    gradient_checkpointing_reentrant: bool = False
    """Use the older, re-entrant kind of checkpointing."""
    logging_steps: int = 1
    """Optimizer steps from one log line to the next."""
    eval_steps: int = 0
    """Optimizer steps from one evaluation to the next; 0: at start and end only."""
    eval_on_start: bool = True
    """Evaluate before the first step; --no_eval_on_start to skip it."""
    max_eval_batches: int | None = None
    """Batches per evaluation set, over all ranks. Default: all of it."""
    save_steps: int = 0
    """Optimizer steps from one checkpoint to the next; 0: one at the end."""
    save_total_limit: int | None = None
    """Checkpoints to keep, newest first. Default: all."""
    async_save: bool = False
    """Write checkpoints in the background: training waits for the copy into host memory only."""
    seed: int = 42
    """Seed of data order, initialisation, dropout and permutations."""
    export_merged: bool = False
    """Write a merged Hugging Face model to OUTPUT_DIR/merged at the end."""
    collective_timeout_s: float | None = None
    """Seconds that a rank waits for the others in a collective, and for their start, before it gives up; longer than
    rank 0 takes to hash a checkpoint. Default: DEEPSPEED_TIMEOUT (minutes) where that is set, otherwise 30 minutes."""
    peer_silence_s: float = 120.0
    """Seconds after which a rank that gives no sign of life (a node or its link gone) takes the run down; 0: never."""
    local_rank: int = -1
    """Set by the launcher."""

    def engine_settings(self) -> EngineSettings:
        """What the DeepSpeed config must agree with."""
        return EngineSettings(
            micro_batch_size=self.per_device_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            betas=(self.adam_beta1, self.adam_beta2),
            epsilon=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            bf16=self.bf16,
            fp16=self.fp16,
            optimizer=OptimizerKind(self.optimizer),
            muon_learning_rate=self.muon_learning_rate,
            muon_momentum=self.muon_momentum,
        )

    @property
    def ranks_per_replica(self) -> int:
        """Consecutive ranks that compute the same rows together."""
        return self.tensor_parallel_size * self.sequence_parallel_size

    @property
    def peak_rate(self) -> float:
        """The schedule's peak: that of the squares."""
        return self.muon_learning_rate if self.optimizer == OptimizerKind.MUON.value else self.learning_rate


@dataclass(frozen=True)
class Arguments:
    """Everything a run was told. Rooms below get the fields they need, never the whole."""

    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    training: TrainingArguments
    given: frozenset[str] = frozenset()
    """Names of the fields that flags or recipe set; the rest are defaults."""

    @property
    def embedded_default(self) -> bool:
        """Whether neither model nor training data is named, so that the run is the embedded demonstration."""
        return not (self.model.model_name_or_path or self.data.train_files or self.data.dataset_name)

    def schedule(self, total_steps: int) -> Schedule:
        """The schedule of a run of `total_steps` optimizer steps. Raises `UserError` for one that cannot be."""
        training, adapter = self.training, self.adapter
        return Schedule(
            kind=schedule_kind(training.lr_scheduler_type),
            peak=training.peak_rate,
            total_steps=total_steps,
            warmup_steps=training.warmup_steps or math.ceil(training.warmup_ratio * total_steps),
            min_ratio=training.min_lr_ratio,
            decay_ratio=training.decay_ratio,
            merge_every=adapter.merge_every,
            restart_warmup_steps=adapter.restart_warmup_steps,
            merge_when=member_named(MergeWhen, "merge_when", adapter.merge_when),
            longest_cycle=adapter.merge_at_latest,
        )


_GROUPS: dict[str, Any] = {
    "model": ModelArguments,
    "adapter": AdapterArguments,
    "data": DataArguments,
    "training": TrainingArguments,
}


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from a command line (without the program's name): an optional YAML recipe first, then flags.

    Raises `UserError` for anything unknown or of a wrong type. `-h` prints help and raises SystemExit(0).
    """
    given = parse_flat(_GROUPS.values(), argv, "Continual pretraining with MoRA under DeepSpeed.", RECORDED_KEYS)
    return from_flat(given)


def from_flat(settings: dict[str, Any]) -> Arguments:
    """Arguments from {field: value} of the right types; what is absent takes its default."""
    groups = {}
    for name, group in _GROUPS.items():
        names = {entry.name for entry in dataclasses.fields(group)}
        groups[name] = group(**{key: value for key, value in settings.items() if key in names})
    return Arguments(**groups, given=frozenset(settings))


def dump(arguments: Arguments) -> dict[str, Any]:
    """{field: value} in plain types for `run.yaml`: a recipe that repeats the run. Without what differs by rank."""
    flat = {key: value for name in _GROUPS for key, value in dataclasses.asdict(getattr(arguments, name)).items()}
    del flat["local_rank"]
    return flat
