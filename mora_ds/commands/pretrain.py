"""Continual pretraining with MoRA under DeepSpeed.

    mora-ds pretrain [RECIPE.yaml] --deepspeed configs/zero3.json [--flags, see --help]
    mora-ds pretrain --num_gpus 8 ...        starts DeepSpeed's launcher, with the launcher's own flags

deepspeed, torchrun and srun start launch/pretrain.py, or `--module mora_ds pretrain`
without a checkout, by themselves.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mora_ds.config.arguments import Arguments, parse
from mora_ds.config.validate import validate
from mora_ds.engine.launcher import (
    accelerators,
    check_connections,
    command,
    launcher_flags,
    run_launcher,
    set_single_process_env,
)
from mora_ds.runtime.cli import say_loading
from mora_ds.runtime.log_setup import set_up_logging
from mora_ds.train.start_up import start_up

if TYPE_CHECKING:
    from mora_ds.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


def start() -> None:
    """Train in this process, or hand over to DeepSpeed's launcher: where one of its
    flags is given, and on a machine with several GPUs, each of which gets a process."""
    for_launcher, flags = launcher_flags(sys.argv[1:])
    if "RANK" not in os.environ:
        # Ends here with --help and for a wrong flag, before torch looks for GPUs
        if parse(flags).training.dry_run:
            say_loading()
        if for_launcher or accelerators() > 1:
            check_connections(for_launcher)
            sys.exit(run_launcher(command(for_launcher, flags)))
        set_single_process_env()
    main()


def main() -> None:
    """Train in this process: one rank of the job, or a job of its own."""
    with start_up():
        arguments = parse(sys.argv[1:])
        set_up_logging(arguments.training.log_level)
        if arguments.left_out:
            names = ", ".join(arguments.left_out)
            logger.info(
                f"left out of the recipe, as the flags leave them no effect: {names}"
            )
    started = time.monotonic()
    summary = train(arguments)
    if summary is not None:
        from mora_ds.train.screen import closing

        for line in closing(arguments, summary, time.monotonic() - started):
            logger.info(line)


def train(arguments: Arguments) -> dict[str, Any] | None:
    """Check the settings, start this process's rank, and run the job. Returns its
    summary; None of a dry run, which has no processes, and of the demo, which ends with
    a table of its own.

    What reads models and text takes seconds to import. It is imported once all ranks
    have the same settings.
    """
    with start_up():
        if arguments.training.dry_run:
            validate(arguments)
            from mora_ds.train.dry_run import dry_run

            dry_run(arguments)
            return None
        # The demo's settings depend on the number of ranks: it validates them itself.
        if not arguments.is_demo:
            validate(arguments)
        from mora_ds.train.setup import start_processes

        ranks = start_processes(arguments)
        run = _job(arguments)
    return run(arguments, ranks)


def _job(
    arguments: Arguments,
) -> Callable[[Arguments, Ranks], dict[str, Any] | None]:
    """The function that runs the job."""
    if arguments.is_demo:
        from mora_ds.train.demo import run_demo

        return run_demo
    from mora_ds.train.pretrain import pretrain

    return pretrain
