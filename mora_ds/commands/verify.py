"""Verify one checkpoint, or all of a run: every file, and that they agree with each
other.

    mora-ds verify out                           all checkpoints of a run, oldest first
    mora-ds verify out/checkpoints/latest --base MODEL

Exit code 1 when a checkpoint is damaged, 2 for an error that you can correct in the
command.
"""

import argparse

from mora_ds.common.errors import RunError
from mora_ds.runtime.cli import command_parser, say, shared_flags


def main() -> None:
    options = _parser().parse_args()
    from mora_ds.checkpoint.verify import verify

    verdicts = verify(options.path, options.base)
    for verdict in verdicts:
        say(*verdict.lines())
    damaged = [verdict.folder.name for verdict in verdicts if not verdict.is_good]
    if damaged:
        raise RunError(
            f"{len(damaged)} of {len(verdicts)} checkpoint(s) damaged: {', '.join(damaged)}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    path = "a checkpoint, a link to one, or a run's output folder"
    shared_flags(parser, "path", help=path, type=str)
    base = "the base's folder, to check that it is the right one"
    shared_flags(parser, "--base", help=base)
    return parser
