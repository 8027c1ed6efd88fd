"""When things happen in the trainer's loop."""

from __future__ import annotations

from dataclasses import dataclass

from mora_ds.remora.stall import StallRule


@dataclass(frozen=True)
class LoopSettings:
    """When things happen, in optimizer steps; 0 means never (but see each)."""

    total_steps: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    eval_batch_size: int
    logging_steps: int = 1
    eval_steps: int = 0
    eval_on_start: bool = True
    max_eval_batches: int | None = None
    save_steps: int = 0
    """0: one checkpoint, at the end."""
    merge_at_end: bool = False
    first_batch: int = 0
    """Number of the first step's batch in the order of the data."""
    others_rate: float = 1.0
    """Learning rate of what is trained beside the squares, as a share of theirs."""
    stall: StallRule | None = None
    """What makes a merge due where the schedule waits for a stall."""
