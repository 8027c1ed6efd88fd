"""Is a merge due? What has flattened is noted step by step, and all ranks decide alike.

a step -> `StallRule.noted` (rank 0's value, broadcast) -> the window in the run's state -> `Schedule.merges_after`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mora_ds.checkpoint.state import TrainerState
from mora_ds.engine import zero
from mora_ds.remora.schedule import Schedule
from mora_ds.remora.stall import StallRule, StallSignal
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.replicas import Share


@dataclass
class StallWatch:
    """Of one run. Without a rule the schedule alone says when."""

    share: Share
    schedule: Schedule
    rule: StallRule | None
    log: MetricsLog
    state: TrainerState
    check_finite: Callable[[float, str], None]
    """Raises `RunError` for a value that is not, called as the text says."""
    has_complained: bool = False

    def note(self, loss: float) -> None:
        """The step just done goes into the running cycle's history, if it was one at full rate and not dropped by fp16
        loss scaling. Collective. Raises `RunError` where the squares are no numbers."""
        rule, state, engine = self.rule, self.state, self.share.engine
        if rule is None or not self.schedule.at_full_rate(state.step - 1, state.merges):
            return
        if zero.step_was_skipped(engine):
            return
        value = loss if rule.signal is StallSignal.LOSS else self._norm_of_squares()
        shared = torch.tensor(value, dtype=torch.float64, device=engine.device)
        dist.broadcast(shared, 0)
        state.stall_window = rule.noted(state.stall_window, shared.item())
        complaint = None if self.has_complained else rule.complaint(state.stall_window)
        if complaint:
            self.log.say(f"step {state.step}: {complaint}")
            self.has_complained = True

    def merge_is_due(self, logs: bool) -> bool:
        """From the state alone, which is the same on all ranks and in every checkpoint. `logs`: whether this step is
        one that is logged."""
        rule, state = self.rule, self.state
        if rule is None:
            return self.schedule.merges_after(state.step, state.merges)
        stalled = rule.stalled(state.stall_window)
        due = self.schedule.merges_after(state.step, state.merges, stalled)
        if due or logs:
            self.log.stall(state.step, {**rule.facts(state.stall_window), "merges": due})
        if due:
            reason = "stalled" if stalled else "at its longest (--merge_at_latest)"
            self.log.say(f"step {state.step}: the cycle is {reason}: {rule.sentence(state.stall_window)}")
        return due

    def _norm_of_squares(self) -> float:
        norm = math.sqrt(self.share.sum(zero.group_energy(self.share.engine, 0)))
        self.check_finite(norm, f"the norm of the squares is {norm} at step {self.state.step}")
        return norm
