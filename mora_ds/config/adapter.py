"""Settings of the adapter: what is trained, and when it is merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mora_ds.adapters.config import AS_LOADED, AdapterConfig, Freeze, LoRAConfig, MoRAConfig
from mora_ds.config.flags import documented
from mora_ds.errors import member_named
from mora_ds.remora.optimizer_reset import OptimizerReset
from mora_ds.remora.schedule import MergeWhen
from mora_ds.remora.stall import DEFAULT_TOLERANCE, StallRule, StallSignal


class AdapterKind(str, Enum):
    """What is trained."""

    MORA = "mora"
    LORA = "lora"
    FULL = "full"
    NONE = "none"


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
    """truncate, share, decouple, rotate, or subspace (between leading singular vectors of the frozen weight, which are
    computed once, at the start). auto: rotate for ranks below 64, share from there on."""
    subspace_cycles: int = 1
    """With --operator subspace: cycles until the same singular vectors come again. 1: all have the leading ones; with 4
    the second cycle has those behind them, the fifth the leading ones again."""
    grouping: str = "permuted"
    """permuted (fresh permutations every cycle), alternate (the paper's strided, contiguous, strided, ... for share),
    plain, or one of share's own: strided, contiguous, contiguous-strided, strided-contiguous."""
    alignment_weight: float = 0.0
    """Adds to the loss minus so much times the share of each square's delta, in squares, that lies in its frozen
    weight's leading subspaces (mean over layers); 0: do not."""
    alignment_rank: int = 16
    """Singular vectors on either side that span these subspaces."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that are adapted: names, globs, regular expressions after re:, or all-linear (all but the head)."""
    targets: str | None = None
    """Which of them get a square, and of what side: a plan's file (tools/analyze_weights.py --write), or auto: as
    their weights use their rank, within --trainable_budget. The plan is OUTPUT_DIR/targets.yaml; --mora_rank then only
    chooses the operator."""
    trainable_budget: str | None = None
    """With --targets auto: parameters of all squares, as a share of the model's (0.5%) or a number."""
    compute: str = "auto"
    """activation (passes over the activations), weight (passes over the weight: W0 + delta, rounded to the run's dtype)
    or auto (the cheaper one by tokens a micro-batch, shape, operator and dtype)."""
    base_bits: int = AS_LOADED
    """8: hold the frozen weights of adapted layers in 8 bits (int8, a scale for each output), half of what bf16 takes;
    merges and exports read the originals. 16: in the run's dtype."""
    compile: bool = False
    """Compile what the operators move (torch.compile; on a CPU with a C++ compiler): one pass each, after slow first
    steps."""
    tp_grouping: str = TPGrouping.GATHER.value
    """gather (any grouping; ranks of a tensor-parallel group gather a square to use it) or aligned (share's groupings,
    confined to --tp_segments segments where the model's plan splits a layer: its square is never communicated)."""
    tp_segments: int = 8
    """Segments of --tp_grouping aligned; --tensor_parallel_size must divide it. The result hangs on it, at any size."""
    mora_dropout: float = 0.0
    """Dropout on the adapter's input, at least 0 and below 1."""
    train_embeddings: bool = False
    """Train the input embeddings too (sharded by ZeRO like the squares)."""
    train_new_embeddings: bool = False
    """Train the rows that tools/extend_vocab.py has added to embeddings and head, and keep the others frozen."""
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
    domain_adapters: bool = False
    """Give every layer a square for each source of --mixture or --train_files beside the shared one; each row of a
    batch uses its own source's. A merge merges the shared ones."""
    freeze: str = Freeze.NONE.value
    """With --domain_adapters: shared or domains keeps these squares as they are; none trains all."""
    init_adapter: str | None = None
    """With --domain_adapters: start from the squares of this checkpoint or adapter, in which nothing is merged; those
    of domains by name."""
    eval_domains: list[str] = field(default_factory=list)
    """With --domain_adapters: SET=DOMAIN, the square that an evaluation set is read with, or SET=shared. Default: that
    of the domain it is called like (or held_out_DOMAIN), the shared one alone where there is none."""

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

    def alignment_identity(self) -> dict[str, Any]:
        """What must not change in mid-run for the loss to be the same function."""
        return {"alignment": [self.alignment_weight, self.alignment_rank]} if self.alignment_weight else {}

    def config(self, seed: int) -> AdapterConfig:
        """These settings as the adapter's own config."""
        common: dict[str, Any] = {
            "target_modules": tuple(self.target_modules),
            "dropout": self.mora_dropout,
            "train_embeddings": self.train_embeddings,
            "train_norms": self.train_norms,
            "train_head": self.train_head,
            "base_bits": self.base_bits,
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
            vector_sets=self.subspace_cycles,
            **common,
        )
