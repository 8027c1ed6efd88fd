"""When to merge, and the learning rate at every step: pure functions of the step and of the merges so far.

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

Where merges come every `merge_every` steps they are known beforehand. With `MergeWhen.STALLED` they come when the run
stalls (see `stall`), and this room only says when one may come. `merges` is the list of past ones, ascending: the
numbers of optimizer steps that were done at each.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from mora_ds.errors import (
    ABOVE_0_AT_MOST_1,
    AT_MOST_1,
    NOT_NEGATIVE,
    POSITIVE,
    UserError,
    out_of_bounds,
    refuse,
    unknown,
)


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
        raise UserError(unknown("--lr_scheduler_type", name, known))
    return known[name]


class MergeWhen(str, Enum):
    """What makes a merge due."""

    STEPS = "steps"
    """So many steps since the run began."""
    STALLED = "stalled"
    """A cycle that has given what it can."""


def conflicts(
    total_steps: int, warmup_steps: int, merges: bool, merge_every: int, restart_warmup_steps: int, longest_cycle: int
) -> Iterator[str]:
    """One message for each pair of settings of a `Schedule` that contradict each other. `merges`: whether it merges."""
    if total_steps < 1:
        yield f"a run needs at least one step, got {total_steps} (--max_steps)"
    elif total_steps <= warmup_steps:
        yield f"--warmup_steps {warmup_steps} must be less than the run's {total_steps} steps (--max_steps)"
    if merges and restart_warmup_steps < 1:
        yield f"--restart_warmup_steps must be at least 1 in a run with merges, got {restart_warmup_steps}"
    if 0 < merge_every <= restart_warmup_steps:
        yield (
            f"--merge_every {merge_every} must be more than --restart_warmup_steps {restart_warmup_steps}: "
            "no step would run at the full learning rate"
        )
    if 0 < longest_cycle < merge_every:
        yield f"--merge_at_latest {longest_cycle} must not be less than --merge_every {merge_every}, the shortest cycle"


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
    """Optimizer steps from one merge to the next; 0 for none. With STALLED: steps of the shortest cycle, 0 for as short
    as the ramp and the signal's window allow."""
    restart_warmup_steps: int = 10
    """Steps of the ramp after each merge, all below the curve."""
    decay_ratio: float = 0.2
    """Share of the steps after the first warm-up in which warmup_stable_decay falls."""
    merge_when: MergeWhen = MergeWhen.STEPS
    longest_cycle: int = 0
    """With STALLED: steps after which a cycle is merged even if nothing has stalled; 0 for no limit."""

    def __post_init__(self) -> None:
        numbers = [
            ("learning_rate", self.peak, POSITIVE),
            ("min_lr_ratio", self.min_ratio, AT_MOST_1),
            ("decay_ratio", self.decay_ratio, ABOVE_0_AT_MOST_1),
            ("warmup_steps", self.warmup_steps, NOT_NEGATIVE),
            ("merge_every", self.merge_every, NOT_NEGATIVE),
            ("merge_at_latest", self.longest_cycle, NOT_NEGATIVE),
        ]
        cycle = self.merges, self.merge_every, self.restart_warmup_steps, self.longest_cycle
        refuse([*out_of_bounds(numbers), *conflicts(self.total_steps, self.warmup_steps, *cycle)])

    @property
    def merges(self) -> bool:
        """Whether squares are merged at all in mid-run."""
        return self.merge_every > 0 or self.merge_when is MergeWhen.STALLED

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

    def learning_rate(self, step: int, merges: Sequence[int] | None = None) -> float:
        """The rate of optimizer step `step` (0-based, the one about to be taken) after past `merges`.

        Without `merges`: those that are planned, of which STALLED has none.
        """
        merged_at = self._last_merge(step, merges)
        if merged_at is None or step - merged_at >= self.restart_warmup_steps:
            return self.curve(step)
        end_of_ramp = self.curve(merged_at + self.restart_warmup_steps)
        return end_of_ramp * (step - merged_at + 1) / (self.restart_warmup_steps + 1)

    def at_full_rate(self, step: int, merges: Sequence[int]) -> bool:
        """Whether step `step` (0-based) lies on the curve: behind the first warm-up and behind the newest ramp."""
        merged_at = self._last_merge(step, merges)
        ramp_is_over = merged_at is None or step - merged_at >= self.restart_warmup_steps
        return self.warmup_steps <= step and ramp_is_over

    def may_merge_after(self, steps_done: int, merges: Sequence[int] | None = None) -> bool:
        """Whether a merge is allowed once `steps_done` optimizer steps are done (1-based: 1 after the first step).

        Never during the first warm-up or inside a ramp, not even one that the merge at the end of a run left behind
        which then went on; and never where so few steps are left that the run would end inside the next ramp: those
        steps would be spent at low rates for nothing, so the running cycle goes on to the end instead. The end of the
        run itself is no such merge (see `--merge_at_end`).
        """
        if not self.merges or steps_done == 0:
            return False
        if self.merge_when is MergeWhen.STEPS and steps_done % self.merge_every:
            return False
        cycle = self._cycle(steps_done, merges)
        in_ramp = cycle < steps_done and cycle <= self.restart_warmup_steps
        too_short = self.merge_when is MergeWhen.STALLED and cycle < self.merge_every
        last_ramp_ends = self.restart_warmup_steps < self.total_steps - steps_done
        return self.warmup_steps <= steps_done and not in_ramp and not too_short and last_ramp_ends

    def merges_after(self, steps_done: int, merges: Sequence[int] | None = None, stalled: bool = False) -> bool:
        """Whether a merge follows once `steps_done` optimizer steps are done.

        Where it may: every `merge_every` steps; or, with STALLED, when the run has `stalled` or the cycle has come to
        its longest.
        """
        if not self.may_merge_after(steps_done, merges):
            return False
        too_long = 0 < self.longest_cycle <= self._cycle(steps_done, merges)
        return self.merge_when is MergeWhen.STEPS or stalled or too_long

    def merge_steps(self) -> list[int]:
        """All step counts after which a merge follows, in order; none with STALLED, which has no plan."""
        return [done for done in self._multiples() if self.merges_after(done)]

    def merges_left_out(self) -> list[int]:
        """Multiples of `merge_every`, behind the first warm-up, at which nothing is merged: too near the end."""
        return [done for done in self._multiples() if self.warmup_steps <= done and not self.merges_after(done)]

    def merge_steps_in_warmup(self) -> list[int]:
        """Multiples of `merge_every` at which nothing is merged since the first warm-up is not over."""
        return [done for done in self._multiples() if done < self.warmup_steps]

    def _multiples(self) -> range:
        planned = self.merge_when is MergeWhen.STEPS and self.merge_every > 0
        return range(self.merge_every, self.total_steps, self.merge_every) if planned else range(0)

    def _last_merge(self, steps_done: int, merges: Sequence[int] | None) -> int | None:
        """The newest merge when `steps_done` steps are done."""
        if merges is not None:
            before = bisect_right(merges, steps_done)
            return merges[before - 1] if before else None
        if self.merge_when is MergeWhen.STALLED or self.merge_every == 0:
            return None
        multiple = steps_done - steps_done % self.merge_every
        return multiple if self.merges_after(multiple) else None

    def _cycle(self, steps_done: int, merges: Sequence[int] | None) -> int:
        """Steps since the newest of past `merges`, or since the run began."""
        return steps_done - ((self._last_merge(steps_done, merges) if merges else None) or 0)
