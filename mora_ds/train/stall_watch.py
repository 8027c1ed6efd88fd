"""Decides whether a merge is due: by the schedule alone, or once training has stalled (--merge_when stalled).

a step -> `StallRule.noted` (rank 0's value, broadcast) -> the window in the run's state -> `Schedule.merges_after`
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mora_ds.checkpoint.state import TrainerState
from mora_ds.engine import zero
from mora_ds.remora.schedule import Schedule
from mora_ds.remora.stall import StallRule, StallSignal
from mora_ds.train.metrics import MetricsLog
from mora_ds.train.replicas import Replica, require_finite

logger = logging.getLogger(__name__)


@dataclass
class StallWatch:
    """Follows one run step by step; every process comes to the same decision."""

    replica: Replica
    schedule: Schedule
    rule: StallRule | None
    """None: the schedule decides alone."""
    log: MetricsLog
    state: TrainerState
    has_complained: bool = False

    def note(self, loss: float) -> None:
        """Add the step just done to the cycle's window, unless it was in the re-warmup or skipped by loss scaling.

        Collective. Raises `NotFinite` where the MoRA matrices hold NaN or infinity.
        """
        rule, state, engine = self.rule, self.state, self.replica.engine
        if rule is None or not self.schedule.at_full_rate(state.step - 1, state.merges):
            return
        if zero.step_was_skipped(engine):
            return
        value = loss
        if rule.signal is not StallSignal.LOSS:
            value = math.sqrt(self.replica.sum(zero.group_energy(engine, 0)))
            require_finite(value, f"the norm of the MoRA matrices is {value} at step {state.step}", state.step)
        shared = torch.tensor(value, dtype=torch.float64, device=engine.device)
        dist.broadcast(shared, 0)
        state.stall_window = rule.noted(state.stall_window, shared.item())
        complaint = None if self.has_complained else rule.complaint(state.stall_window)
        if complaint:
            logger.info(f"step {state.step}: {complaint}")
            self.has_complained = True

    def merge_is_due(self, is_logged: bool) -> bool:
        """Whether to merge after this step, by the run's state alone, which all processes and checkpoints share.

        `is_logged`: whether the step is a logged one, so that the rule's figures are logged too.
        """
        rule, state = self.rule, self.state
        if rule is None:
            return self.schedule.merges_after(state.step, state.merges)
        stalled = rule.stalled(state.stall_window)
        due = self.schedule.merges_after(state.step, state.merges, stalled)
        if due or is_logged:
            self.log.record("stall", state.step, {**rule.facts(state.stall_window), "merges": due})
        if due:
            reason = "stalled" if stalled else "at its longest (--merge_at_latest)"
            logger.info(f"step {state.step}: the cycle is {reason}: {rule.sentence(state.stall_window)}")
        return due
