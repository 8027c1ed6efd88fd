"""torch's profiler over some steps of a run (--profile), as a trace for Perfetto."""

from pathlib import Path

from torch.profiler import profile, schedule, tensorboard_trace_handler

from mora_ds.train.beside import training_goes_on

PROFILE = "profile"
"""The folder of traces in an output folder."""


def step_profiler(steps: int, done: int, folder: Path, failures: list[str]) -> profile:
    """A profiler, to be entered when `done` steps are done. Call its `step()` at the
    beginning of every step from there on.

    It leaves out two steps, since DeepSpeed looks at the model in the first one and the
    profiler itself starts up in the second one. It records the next `steps`, with
    shapes and memory, and writes their trace below `folder` after the last of them, or
    when it is left before. A trace must not cost the run: where it cannot be written,
    the reason is added to `failures`.
    """
    write = tensorboard_trace_handler(str(folder / PROFILE), "rank-0", use_gzip=True)

    def write_or_tell(profiler: profile) -> None:
        with training_goes_on(
            f"--profile: {folder / PROFILE} got no complete trace", failures
        ):
            write(profiler)

    profiler = profile(
        schedule=schedule(
            skip_first=done + 1, wait=1, warmup=1, active=steps, repeat=1
        ),
        on_trace_ready=write_or_tell,
        record_shapes=True,
        profile_memory=True,
    )
    # It would count from 0, and these numbers are the names of the steps in the trace.
    profiler.step_num = done
    return profiler
