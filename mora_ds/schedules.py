"""When to merge, and the learning rate at every step: pure functions of the step.

    rate
    peak |    /\\___        merge                     a global curve (linear, cosine, constant, stable-decay) after a
         |   /     \\__|     |                         first warm-up; at a merge the rate drops to almost 0 and climbs
         |  /         |   /\\|    ___                  back to the curve along a straight line
         | /          |  /  |   /   \\__
         |/           |_/   |__/
         +-------------------------------> step

The curve and the ramps are those of ReLoRA (arXiv 2307.05695), except that no step is taken at full rate between a
merge and its ramp, and none at rate 0: with `warmup_steps = W`, step k of a warm-up runs at (k + 1) / (W + 1) of where
it leads, so that exactly W steps lie below the curve and step W lies on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from mora_ds.errors import UserError, nearest


class ScheduleKind(str, Enum):
    """Shape of the global curve between the first warm-up and the end of the run."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


ALIASES = {"constant_with_warmup": ScheduleKind.CONSTANT, "wsd": ScheduleKind.WARMUP_STABLE_DECAY}
"""Names that Hugging Face users know for the same curves: the warm-up is a setting of its own here."""


def schedule_kind(name: str) -> ScheduleKind:
    """The kind called `name`. Raises `UserError` (it names --lr_scheduler_type) for an unknown one."""
    known = {**{kind.value: kind for kind in ScheduleKind}, **ALIASES}
    if name not in known:
        raise UserError(f"unknown --lr_scheduler_type {name!r}; known: {', '.join(known)}.{nearest(str(name), known)}")
    return known[name]


@dataclass(frozen=True)
class Schedule:
    """The learning rate and the merges of a run of `total_steps` optimizer steps.

    Steps are counted from 0: `learning_rate(0)` is the rate of the first step. Raises `UserError` for settings that
    make no schedule.
    """

    kind: ScheduleKind
    peak: float
    """The highest rate, `--learning_rate`."""
    total_steps: int
    """Optimizer steps of the whole run."""
    warmup_steps: int = 0
    """Steps of the first warm-up, all below the peak."""
    min_ratio: float = 0.0
    """The curve falls towards min_ratio * peak, which it would reach at step `total_steps`."""
    merge_every: int = 0
    """Optimizer steps from one merge to the next; 0 for none."""
    restart_warmup_steps: int = 10
    """Steps of the ramp after each merge, all below the curve."""
    decay_ratio: float = 0.2
    """Share of the steps after the first warm-up in which warmup_stable_decay falls."""

    def __post_init__(self) -> None:
        problems = [message for wrong, message in self._checks() if wrong]
        if problems:
            raise UserError("\n".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        total, warmup, every, ramp = self.total_steps, self.warmup_steps, self.merge_every, self.restart_warmup_steps
        return [
            (not 0 < self.peak < math.inf, f"--learning_rate must be above 0, got {self.peak}"),
            (not 0 <= self.min_ratio <= 1, f"--min_lr_ratio must lie in 0..1, got {self.min_ratio}"),
            (not 0 < self.decay_ratio <= 1, f"--decay_ratio must lie in 0..1 and above 0, got {self.decay_ratio}"),
            (total < 1, f"a run needs at least one step, got {total} (--max_steps)"),
            (warmup < 0, f"--warmup_steps must not be negative, got {warmup}"),
            (0 < total <= warmup, f"--warmup_steps {warmup} must be less than the run's {total} steps (--max_steps)"),
            (every < 0, f"--merge_every must not be negative (0: no merges), got {every}"),
            (every > 0 and ramp < 1, f"--restart_warmup_steps must be at least 1 where squares are merged, got {ramp}"),
            (
                0 < every <= ramp,
                f"--merge_every {every} must be more than --restart_warmup_steps {ramp}: "
                "no step would run at the full rate",
            ),
        ]

    def curve(self, step: int) -> float:
        """The rate at `step` as if nothing were ever merged: first warm-up, then the global curve."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        height = {
            ScheduleKind.CONSTANT: 1.0,
            ScheduleKind.LINEAR: 1.0 - progress,
            ScheduleKind.COSINE: 0.5 * (1.0 + math.cos(math.pi * progress)),
            ScheduleKind.WARMUP_STABLE_DECAY: min(1.0, (1.0 - progress) / self.decay_ratio),
        }[self.kind]
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * height)

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step `step` (0-based, the one about to be taken)."""
        since_merge = step % self.merge_every if self.merge_every else 0
        merged_at = step - since_merge
        if since_merge >= self.restart_warmup_steps or not self.merges_after(merged_at):
            return self.curve(step)
        end_of_ramp = self.curve(merged_at + self.restart_warmup_steps)
        return end_of_ramp * (since_merge + 1) / (self.restart_warmup_steps + 1)

    def merges_after(self, steps_done: int) -> bool:
        """Whether a merge follows once `steps_done` optimizer steps are done (1-based: 1 after the first step).

        Every `merge_every` steps, except during the first warm-up, and except where so few steps are left that the
        run would end inside the ramp: those steps would be spent at low rates for nothing, so the running cycle goes
        on to the end instead. The end of the run itself is no scheduled merge (see `--merge_at_end`).
        """
        if self.merge_every == 0 or steps_done == 0 or steps_done % self.merge_every:
            return False
        return self.warmup_steps <= steps_done and self.restart_warmup_steps < self.total_steps - steps_done

    def merge_steps(self) -> list[int]:
        """All step counts after which a merge follows, in order."""
        if self.merge_every == 0:
            return []
        return [done for done in range(self.merge_every, self.total_steps, self.merge_every) if self.merges_after(done)]
