"""Settings of the run itself: batches, optimizer, precision, saving."""

from __future__ import annotations

from dataclasses import dataclass, field

from mora_ds.config.flags import documented
from mora_ds.engine.ds_config import EngineSettings
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.runtime.log_setup import LogLevel


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
    base stays whole on each. Consecutive ranks, best of one node. Ranks of the run = this x data-parallel replicas.
    Default: what --deepspeed says ("tensor_parallel": {"autotp_size": t}), or 1."""
    tp_inputs: str = "auto"
    """How the ranks of such a group keep the input that layers share (q, k, v; gate, up) until backward: split (each
    its tokens; gathered again), whole (no such gather), or auto: split, but whole with --gradient_checkpointing."""
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
    embedding_learning_rate: float | None = None
    """Peak rate of what is trained beside the squares: embeddings, new rows, norms, head. Default: --learning_rate."""
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
    chunked_loss: bool = False
    """Compute the loss of some tokens at a time, so that the logits of a whole batch are never held (8 bytes x tokens x
    vocabulary): less memory, a third more arithmetic in the head."""
    log_level: str = LogLevel.INFO.value
    """Least severe messages that rank 0 prints: debug, info, warning or error. Other ranks print warnings and errors;
    with debug they print everything too."""
    logging_steps: int = 1
    """Optimizer steps from one log line to the next."""
    eval_steps: int = 0
    """Optimizer steps from one evaluation to the next; 0: at start and end only."""
    eval_on_start: bool = True
    """Evaluate before the first step; --no_eval_on_start to skip it."""
    stop_when_forgotten: list[str] = field(default_factory=list)
    """Evaluation sets as NAME:RATIO (general:1.10): save and stop once one's perplexity passes this ratio to its
    start."""
    best_by: list[str] = field(default_factory=list)
    """Evaluation sets as NAME:WEIGHT: the checkpoint of the least weighted sum of losses stays as checkpoints/best."""
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
    heartbeat_timeout_s: float = 120.0
    """Seconds without a heartbeat of a rank (its node or its link has failed) after which the run ends; 0: never."""
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
            tensor_parallel_size=self.tensor_parallel_size,
        )

    @property
    def ranks_per_replica(self) -> int:
        """Consecutive ranks that compute the same rows together."""
        return self.tensor_parallel_size * self.sequence_parallel_size

    def rows_per_step(self, world: int) -> int:
        """Global batch size of a run on `world` processes, in sequences."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * (world // self.ranks_per_replica)

    @property
    def peak_rate(self) -> float:
        """The schedule's peak: that of the squares."""
        return self.muon_learning_rate if self.optimizer == OptimizerKind.MUON.value else self.learning_rate

    @property
    def others_rate(self) -> float:
        """Rate of what is trained beside the squares, as a share of theirs."""
        rate = self.learning_rate if self.embedding_learning_rate is None else self.embedding_learning_rate
        return rate / self.peak_rate
