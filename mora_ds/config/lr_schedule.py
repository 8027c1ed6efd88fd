"""When to merge, and the learning rate at every step: pure functions of the step and of
past merges.

    learning rate
    peak |    /\\___        merge                     a global curve (linear, cosine, constant, stable-decay) after the
         |   /     \\__|     |                         first warm-up; at a merge the learning rate drops to almost 0,
         |  /         |   /\\|    ___                  and a re-warmup raises it to the curve along a straight line
         | /          |  /  |   /   \\__
         |/           |_/   |__/
         +-------------------------------> step

Curve and re-warmup are those of ReLoRA (arXiv 2307.05695), except that no step runs at
the full learning rate between a merge and its re-warmup, and none at zero: with
`warmup_steps = W`, step k of a warm-up runs at (k + 1) / (W + 1) of the learning rate
that it leads to, so that exactly W steps lie below the curve and step W lies on it.

All merges are known in advance, but a run that resumes with another length keeps those
that it has made: `merges` always is the list of past merges, the numbers of optimizer
steps done at each, ascending.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from mora_ds.common.errors import (
    ABOVE_0_AT_MOST_1,
    AT_MOST_1,
    NOT_NEGATIVE,
    UserError,
    raise_validation_errors,
    unknown,
    validation_errors_of,
    wrong_values,
)
from mora_ds.config.flags import documented


class ScheduleKind(str, Enum):
    """Shape of the global curve between the first warm-up and the end of the run."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


ALIASES = {
    "constant_with_warmup": ScheduleKind.CONSTANT,
    "wsd": ScheduleKind.WARMUP_STABLE_DECAY,
}
"""Hugging Face's names of the same curves; the warm-up is a separate setting here."""


def schedule_kind(name: str) -> ScheduleKind:
    """The kind called `name`. Raises `UserError` (it names --lr_scheduler_type) for an
    unknown one."""
    known = {**{kind.value: kind for kind in ScheduleKind}, **ALIASES}
    if name not in known:
        raise UserError(unknown("--lr_scheduler_type", name, known))
    return known[name]


def conflicts(
    total_steps: int,
    warmup_steps: int,
    merge_every: int,
    restart_warmup_steps: int,
) -> Iterator[str]:
    """One message for each pair of settings of a `Schedule` that contradict each
    other."""
    if total_steps < 1:
        yield f"a run needs at least one step, got {total_steps} (--max_steps)"
    elif total_steps <= warmup_steps:
        yield f"--warmup_steps {warmup_steps} must be less than the run's {total_steps} steps (--max_steps)"
    if merge_every > 0 and restart_warmup_steps < 1:
        yield f"--restart_warmup_steps must be at least 1 in a run with merges, got {restart_warmup_steps}"
    if 0 < merge_every <= restart_warmup_steps:
        yield (
            f"--merge_every {merge_every} must be more than --restart_warmup_steps {restart_warmup_steps}: "
            "no step would run at the full learning rate"
        )


def rewarmed(
    curve: Callable[[int], float],
    step: int,
    merges: Sequence[int],
    restart_warmup_steps: int,
) -> float:
    """`curve` at a step, or the straight line back to it after the last merge."""
    before = bisect_right(merges, step)
    if before == 0 or step - merges[before - 1] >= restart_warmup_steps:
        return curve(step)
    merged_at = merges[before - 1]
    target = curve(merged_at + restart_warmup_steps)
    return target * (step - merged_at + 1) / (restart_warmup_steps + 1)


@dataclass(frozen=True)
class Schedule:
    """The learning rate and the merges of a run of `total_steps` optimizer steps.

    Steps are counted from 0: `learning_rate(0)` is that of the first step. Raises
    `UserError` for settings that contradict each other.
    """

    kind: ScheduleKind
    peak: float
    """The highest learning rate, `--learning_rate`."""
    total_steps: int
    """Optimizer steps of the complete run."""
    warmup_steps: int = 0
    """Steps of the first warm-up, all below the peak."""
    min_ratio: float = 0.0
    """The curve decays towards min_ratio * peak, at step `total_steps`."""
    merge_every: int = 0
    """Optimizer steps from one merge to the next; 0 for no merges."""
    restart_warmup_steps: int = 10
    """Steps of the re-warmup after each merge, all below the curve."""
    decay_ratio: float = 0.2
    """Fraction of the steps after the first warm-up in which warmup_stable_decay
    decays."""

    def __post_init__(self) -> None:
        raise_validation_errors(
            conflicts(
                self.total_steps,
                self.warmup_steps,
                self.merge_every,
                self.restart_warmup_steps,
            )
        )

    def curve(self, step: int) -> float:
        """The learning rate at `step` without merges: first warm-up, then the curve."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        curve_steps = self.total_steps - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / curve_steps)
        height = {
            ScheduleKind.CONSTANT: 1.0,
            ScheduleKind.LINEAR: 1.0 - progress,
            ScheduleKind.COSINE: 0.5 * (1.0 + math.cos(math.pi * progress)),
            ScheduleKind.WARMUP_STABLE_DECAY: min(
                1.0, (1.0 - progress) / self.decay_ratio
            ),
        }[self.kind]
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * height)

    def is_at_peak(self, step: int) -> bool:
        """Whether the curve is at the peak, but for rounding, at `step`."""
        return self.curve(step) >= self.peak * (1 - 1e-9)

    def learning_rate(self, step: int, merges: Sequence[int] = ()) -> float:
        """The learning rate of the next step, `step` from 0, after past `merges`."""
        return rewarmed(self.curve, step, merges, self.restart_warmup_steps)

    def merges_after(self, steps_done: int) -> bool:
        """Whether a merge follows once `steps_done` optimizer steps are done.

        Never during the first warm-up. Nor where so few steps are left that the run
        would end during the next re-warmup: those steps would run at low learning rates
        to no effect, so the current cycle continues to the end.
        """
        if self.merge_every == 0 or steps_done == 0 or steps_done % self.merge_every:
            return False
        rewarmup_ends = self.restart_warmup_steps < self.total_steps - steps_done
        return self.warmup_steps <= steps_done and rewarmup_ends

    def merges_left(self, done: int) -> list[int]:
        """The steps after which merges follow in a run that has `done` steps."""
        return [
            step
            for step in range(done + 1, self.total_steps)
            if self.merges_after(step)
        ]


@dataclass(frozen=True)
@documented
class ScheduleArguments:
    """How the learning rate follows its peak from step to step."""

    min_lr_ratio: float = 0.0
    """The learning rate decays towards this fraction of its peak."""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant (constant_with_warmup is the same) or
    warmup_stable_decay (wsd)."""
    decay_ratio: float = 0.2
    """Fraction of the steps after the first warm-up in which warmup_stable_decay
    decays."""
    decay_from: str | None = None
    """A checkpoint at the peak learning rate, of a run with warmup_stable_decay or
    constant: this run goes on from there, its batches too, and decays over --max_steps
    steps."""
    warmup_steps: float = 0
    """Optimizer steps of the first warm-up; below 1: its fraction of the run, rounded up
    to whole steps."""

    def of_run(
        self,
        total_steps: int,
        peak: float,
        merge_every: int,
        restart_warmup_steps: int,
        decay_start: int | None = None,
    ) -> Schedule:
        """The schedule of a run of `total_steps` optimizer steps. `decay_start`: how
        many of them come before a decay that begins at a checkpoint (--decay_from),
        after the warm-up. Raises `UserError` for contradicting settings."""
        warmup_steps = self.first_warmup(total_steps)
        decay_ratio = self.decay_ratio
        if decay_start is not None:
            if total_steps <= decay_start:
                raise UserError(
                    f"--decay_from: {total_steps} steps end before the decay, which begins after {decay_start}: raise "
                    "--max_steps"
                )
            # Whatever --warmup_steps says here, the checkpoint is past it, at the peak.
            warmup_steps = min(warmup_steps, decay_start)
            decay_ratio = (total_steps - decay_start) / (total_steps - warmup_steps)
        return Schedule(
            kind=schedule_kind(self.lr_scheduler_type),
            peak=peak,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            min_ratio=self.min_lr_ratio,
            decay_ratio=decay_ratio,
            merge_every=merge_every,
            restart_warmup_steps=restart_warmup_steps,
        )

    def first_warmup(self, total_steps: int) -> int:
        """Optimizer steps of the first warm-up in a run of `total_steps`. An invalid
        number counts as 0."""
        if not NOT_NEGATIVE.allow(self.warmup_steps):
            return 0
        if self.warmup_steps < 1:
            return math.ceil(self.warmup_steps * total_steps)
        return int(self.warmup_steps)

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings alone, one message each."""
        limits = {
            "min_lr_ratio": AT_MOST_1,
            "decay_ratio": ABOVE_0_AT_MOST_1,
            "warmup_steps": NOT_NEGATIVE,
        }
        yield from wrong_values(self, limits)
        yield from validation_errors_of(schedule_kind, self.lr_scheduler_type)
        has_decay = self.lr_scheduler_type in ("warmup_stable_decay", "wsd")
        if self.decay_from is not None and not has_decay:
            yield "--decay_from: a run that decays from a checkpoint has --lr_scheduler_type warmup_stable_decay"
        is_number = NOT_NEGATIVE.allow(self.warmup_steps)
        if is_number and self.warmup_steps > 1 and self.warmup_steps % 1:
            yield f"--warmup_steps must be whole, or a fraction of the run below 1, got {self.warmup_steps}"

    def unused(self) -> dict[str, str]:
        """{setting: what it is for} of those that have no effect on the curve. Raises
        `UserError` for an unknown one."""
        kind = schedule_kind(self.lr_scheduler_type)
        unused = {}
        if kind is ScheduleKind.CONSTANT:
            unused["min_lr_ratio"] = "an --lr_scheduler_type that decays"
        if kind is not ScheduleKind.WARMUP_STABLE_DECAY or self.decay_from is not None:
            purpose = "--lr_scheduler_type warmup_stable_decay without --decay_from"
            unused["decay_ratio"] = purpose
        return unused
