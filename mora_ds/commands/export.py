"""Write the merged Hugging Face model of a checkpoint.

    mora-ds export --checkpoint out/checkpoints/latest --output merged --verify
    mora-ds export --checkpoint out --output milder --delta_scale 0.7
    mora-ds export --checkpoint out --onto INSTRUCT --output chat

Exit code 2: an error that you can correct in the command or the files; 1: a damaged
checkpoint, logits that differ, a full disk.
"""

import argparse

from mora_ds.common.errors import named_as_flags
from mora_ds.runtime.cli import command_parser, say, shared_flags, source


@named_as_flags(
    "checkpoint",
    "output",
    "verify",
    "overwrite",
    "domain",
    "delta_scale",
    "base_bits",
    "onto",
    base_folder="--base",
)
def main() -> None:
    options = _parser().parse_args()
    from mora_ds.deploy.export import export_merged
    from mora_ds.deploy.fork_adapters import read_fork
    from mora_ds.deploy.hub import check_repository, push_folder

    if options.push_to_hub is not None:
        check_repository(options.push_to_hub)
    with read_fork(options.checkpoint, options.base) as checkpoint:
        report = export_merged(
            checkpoint,
            options.output,
            base_folder=options.base,
            dtype=options.dtype,
            verify=options.verify,
            overwrite=options.overwrite,
            domain=options.domain,
            delta_scale=options.delta_scale,
            trust_remote_code=options.trust_remote_code,
            onto=options.onto,
        )
    say(str(report))
    if options.push_to_hub is not None:
        say(push_folder(options.output, options.push_to_hub))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=source,
        required=True,
        help="step folder, link to one, output folder, or a MoRA adapter of kongds's PEFT",
    )
    shared_flags(parser, "--output", "--base", "--domain", "--trust_remote_code")
    shared_flags(parser, "--onto", "--delta_scale")
    shared_flags(parser, "--dtype", help="auto: that of the run, or of --onto")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="load the result and compare its logits with those recorded in training",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a model that stands at --output",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="REPO",
        help="also upload it to this repository of the Hub; a new one is private",
    )
    return parser
