"""torch.profiler for a few steps of a run (--profile); writes a trace for Perfetto."""

from pathlib import Path

from torch.profiler import profile, schedule, tensorboard_trace_handler

from mora_ds.train.non_fatal import non_fatal

PROFILE = "profile"
"""The folder of traces in an output folder."""


def step_profiler(steps: int, done: int, folder: Path, failures: list[str]) -> profile:
    """A profiler to enter after `done` completed steps. Call its `step()` at the start
    of every following step.

    It skips two steps: DeepSpeed traces the model in the first, the profiler warms up
    in the second. It records the next `steps`, with shapes and memory, and writes their
    trace to `folder` after the last one or on exit. If the trace cannot be written, the
    reason is added to `failures` and the run continues.
    """
    write = tensorboard_trace_handler(str(folder / PROFILE), "rank-0", use_gzip=True)

    def write_trace(profiler: profile) -> None:
        with non_fatal(
            f"--profile: {folder / PROFILE} got no complete trace", failures
        ):
            write(profiler)

    profiler = profile(
        schedule=schedule(
            skip_first=done + 1, wait=1, warmup=1, active=steps, repeat=1
        ),
        on_trace_ready=write_trace,
        record_shapes=True,
        profile_memory=True,
    )
    # The trace names steps by this number, which would start at 0.
    profiler.step_num = done
    return profiler
