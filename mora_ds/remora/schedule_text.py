"""The lines about merges at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence

from mora_ds.remora.schedule import Schedule

_SHOWN = 6
"""Step numbers shown at each end of a long list."""


def start_lines(schedule: Schedule, done: int = 0, merge_pending: bool = False) -> list[str]:
    """When merges will come, and which are left out, after `done` steps; no lines without merges.

    `merge_pending`: whether the merge after step `done` is still to be made, which a resumed run begins with.
    """
    if schedule.merge_every == 0:
        return []
    ahead = [step for step in schedule.multiples() if step > done]
    coming = [step for step in ahead if schedule.merges_after(step)]
    if merge_pending and done < schedule.total_steps:
        coming = [done, *coming]
    early = [step for step in ahead if step < schedule.warmup_steps]
    lines = [f"merges after {_steps(coming)} of {schedule.total_steps}"] if coming else []
    if early:
        lines.append(f"no merge after {_steps(early)}: the first warm-up takes {schedule.warmup_steps}")
    late = [step for step in ahead if step >= schedule.warmup_steps and not schedule.merges_after(step)]
    lines += [_left_out(schedule, step) for step in late]
    if not lines:
        steps_left = (
            f"{schedule.total_steps - done} steps are left" if done else f"the run has {schedule.total_steps} steps"
        )
        lines.append(f"there will be no merge: --merge_every is {schedule.merge_every}, {steps_left}")
    return lines


def _left_out(schedule: Schedule, step: int) -> str:
    left = schedule.total_steps - step
    return (
        f"the merge at step {step} is left out: {left} steps would follow and the re-warmup alone takes "
        f"{schedule.restart_warmup_steps} (--restart_warmup_steps). The cycle before it goes on to step "
        f"{schedule.total_steps}; its update stays unmerged, and exports add it"
    )


def _steps(steps: Sequence[int]) -> str:
    """ "step 5", "steps 5, 10", or a long list without its middle."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) <= 2 * _SHOWN:
        return f"steps {', '.join(map(str, steps))}"
    ends = [", ".join(map(str, end)) for end in (steps[:_SHOWN], steps[-_SHOWN:])]
    return f"steps {ends[0]}, ..., {ends[1]} ({len(steps)} in all)"
