"""Settings of the run itself: batches, optimizer, precision, evaluation, saving."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from mora_ds.common.errors import (
    POSITIVE,
    Bounds,
    out_of_bounds,
    unknown,
    validation_errors_of,
)
from mora_ds.common.untrusted import check_url, expanded, is_url
from mora_ds.config.flags import documented
from mora_ds.config.forgetting import Watch
from mora_ds.engine.settings import BaseDevice, EngineSettings, OptimizerKind
from mora_ds.runtime.log_setup import LogLevel

NO_TRACKER = "none"
TRACKERS = ("tensorboard", "wandb", NO_TRACKER)

ADAMW_LEARNING_RATE = 4e-4
"""Default of --learning_rate under adamw, and under muon of
--embedding_learning_rate."""

MUON_LEARNING_RATE = 0.01
"""Default of --learning_rate under muon."""


@dataclass(frozen=True)
@documented
class TrainingArguments:
    """The run itself: batches, optimizer, precision, evaluation, saving."""

    output_dir: str = "out"
    """Folder of everything that the run writes, or a URL such as s3://bucket/run."""
    overwrite_output_dir: bool = False
    """Delete the run that --output_dir holds."""
    resume_from_checkpoint: str | None = None
    """latest (fails without one), auto (starts from the beginning without one), or the
    path of a checkpoint."""
    deepspeed: str | None = None
    """DeepSpeed's JSON file, such as configs/zero3.json. Default: ZeRO-3 with every
    value "auto"."""
    tensor_parallel_size: int = 1
    """Ranks that split the work of one: each computes a slice of every layer and holds
    a part of every MoRA matrix; the base stays unsharded on each. Consecutive ranks,
    best on one node. Ranks of the run = this x data-parallel replicas."""
    base_device: str = BaseDevice.AUTO.value
    """Where the frozen weights of the decoder layers are: device, or host (in host
    memory; a GPU holds those of two layers at a time, and copies the next one while it
    computes). auto: device, unless the plan says that the base does not fit there."""
    dry_run: bool = False
    """Print what each rank would hold and send, and stop: nothing is trained, the
    output folder stays as it is."""
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
    """Consecutive ranks that share every row, each with its part of the tokens
    (DeepSpeed's Ulysses), for sequences too long for one; the base stays unsharded on
    every rank. Batch sizes then count the sequences of such a group."""
    optimizer: str = OptimizerKind.ADAMW.value
    """adamw, or muon: Muon for the MoRA matrices (of LoRA each factor), AdamW for all
    other trained parameters."""
    learning_rate: float | None = None
    """Peak learning rate of the adapter, or of everything with --adapter full. Default:
    4e-4 under adamw, where four times the rank needs half of it; 0.01 under muon, where
    every update of a matrix has about this spectral norm, whatever the gradient is
    (small models from scratch want 0.03)."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of the other trained parameters (modules_to_save): embeddings, new rows, norms, head. Default:
    --learning_rate under adamw, 4e-4 under muon, which leaves them to AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay, AdamW's and Muon's."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Adam's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm; 0 for no clipping."""
    bf16: bool = False
    """Compute in bfloat16; master copies of the trained parameters stay in fp32."""
    fp16: bool = False
    """Compute in float16 with loss scaling."""
    deterministic: bool = False
    """On GPUs: use only operations, workspaces and NCCL algorithms that give the same
    bits each time, so that a resumed run equals an uninterrupted one to the bit, as it
    does on CPUs without this flag. Slower, most of all in attention; an operation that
    has no such form ends the run with its name."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    chunked_loss: bool = False
    """Compute the loss of a few tokens at a time where the head is trained too, so that
    the logits of a complete batch are never in memory (8 bytes x tokens x vocabulary):
    less memory, a third more arithmetic in the head. With a frozen head, which costs
    nothing more, it is always done."""
    log_level: str = LogLevel.INFO.value
    """Least severe messages that rank 0 prints: debug, info, warning or error. Other
    ranks print warnings and errors; with debug they print everything too. Debug adds
    the adapted layers; `mora-ds pretrain` with debug or info given in the command also
    shows what DeepSpeed's launcher prints."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where the curves go besides metrics.jsonl: tensorboard, wandb, or none."""
    logging_steps: int = 1
    """Optimizer steps between log lines."""
    profile: int | None = None
    """Record this number of steps of rank 0, from the third one on, with torch's
    profiler: the trace in OUTPUT_DIR/profile opens in ui.perfetto.dev and TensorBoard.
    A few are enough; they are slower, and a trace is large."""
    eval_steps: int = 0
    """Optimizer steps between evaluations; 0: at start and end only."""
    eval_on_start: bool = True
    """Evaluate before the first step; --no_eval_on_start to skip it."""
    eval_tasks: list[str] = field(default_factory=list)
    """Tasks of the lm-eval harness to evaluate on the live model, at start and end;
    FILE.yaml is a task of your own."""
    eval_tasks_steps: int = 0
    """Optimizer steps between evaluations of --eval_tasks, a multiple of --eval_steps;
    0: at start and end only."""
    stop_when_forgotten: list[str] = field(default_factory=list)
    """Evaluation sets as NAME:RATIO (general:1.10): save and stop once the perplexity
    of one is above RATIO times its value at the start. A task of --eval_tasks: once its
    score is below its value at the start divided by RATIO."""
    best_by: list[str] = field(default_factory=list)
    """Evaluation sets as NAME:WEIGHT: the checkpoint with the lowest weighted sum of
    losses is kept as checkpoints/best. A task's loss is minus the logarithm of its
    score."""
    max_eval_batches: int | None = None
    """Batches per evaluation set, over all ranks. Default: the complete set."""
    save_steps: int = 500
    """Optimizer steps between checkpoints; 0: one at the end."""
    save_total_limit: int | None = None
    """Number of checkpoints to keep, the newest ones. Default: all."""
    async_save: bool = False
    """Write checkpoints in the background: training waits only for the copy into host
    memory."""
    seed: int = 42
    """Seed of data order, initialization, dropout and permutations."""
    export_merged: bool = False
    """Write a merged Hugging Face model to OUTPUT_DIR/merged at the end."""
    push_to_hub: str | None = None
    """Upload the merged model (with --export_merged), or else the adapter alone, to
    this repository of the Hugging Face Hub at the end. A new repository is private; the
    token is that of `hf auth login`, or HF_TOKEN."""
    collective_timeout_s: float | None = None
    """Seconds that a rank waits for the others in a collective, and for their start,
    before it fails; longer than rank 0 needs to hash a checkpoint. With --async_save
    also for the disk. Default: DEEPSPEED_TIMEOUT (minutes) where that is set, otherwise
    30 minutes."""

    def engine_settings(self) -> EngineSettings:
        """The settings that the DeepSpeed config must agree with."""
        return EngineSettings(
            micro_batch_size=self.per_device_train_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.peak_learning_rate,
            other_learning_rate=self.other_learning_rate,
            betas=(self.adam_beta1, self.adam_beta2),
            epsilon=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            bf16=self.bf16,
            fp16=self.fp16,
            optimizer=OptimizerKind(self.optimizer),
        )

    @property
    def ranks_per_replica(self) -> int:
        """Number of consecutive ranks that compute the same sequences together."""
        return self.tensor_parallel_size * self.sequence_parallel_size

    def global_batch_size(self, world: int) -> int:
        """Global batch size of a run on `world` processes, in sequences."""
        replicas = world // self.ranks_per_replica
        micro_batches = self.gradient_accumulation_steps * replicas
        return self.per_device_train_batch_size * micro_batches

    @property
    def has_muon(self) -> bool:
        """Whether MoRA matrices are trained by Muon."""
        return self.optimizer == OptimizerKind.MUON

    @property
    def peak_learning_rate(self) -> float:
        """The schedule's peak: of the adapter, or of everything in full training."""
        if self.learning_rate is not None:
            return self.learning_rate
        return MUON_LEARNING_RATE if self.has_muon else ADAMW_LEARNING_RATE

    @property
    def other_learning_rate(self) -> float:
        """Peak learning rate of the other trained parameters (modules_to_save)."""
        if self.embedding_learning_rate is not None:
            return self.embedding_learning_rate
        return ADAMW_LEARNING_RATE if self.has_muon else self.peak_learning_rate

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings alone, one message each."""
        for name in self.report_to:
            if name not in TRACKERS:
                yield unknown("--report_to", name, TRACKERS)
        if self.max_steps != -1 and self.max_steps < 1:
            yield f"--max_steps must be at least 1, or -1 for --num_train_epochs to decide, got {self.max_steps}"
        yield from out_of_bounds("max_steps", self.max_steps, Bounds())
        if self.max_steps == -1 and not POSITIVE.allow(self.num_train_epochs):
            yield f"--num_train_epochs must be {POSITIVE}, got {self.num_train_epochs}"
        check = check_url if is_url(self.output_dir) else expanded
        yield from validation_errors_of(check, self.output_dir, "--output_dir")
        is_multiple = (
            self.eval_steps != 0 and self.eval_tasks_steps % self.eval_steps == 0
        )
        if self.eval_tasks_steps and not is_multiple:
            yield (
                f"--eval_tasks_steps {self.eval_tasks_steps}: tasks are evaluated with the evaluation sets, so it must "
                f"be a multiple of --eval_steps, {self.eval_steps}"
            )
        yield from validation_errors_of(
            Watch.of, self.stop_when_forgotten, self.best_by
        )
        if self.stop_when_forgotten and not self.eval_on_start:
            yield "--stop_when_forgotten compares with the start: leave out --no_eval_on_start"
