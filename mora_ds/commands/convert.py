"""Convert a checkpoint into an adapter without its run, or a LoRA adapter of PEFT.

    mora-ds convert adapter out/checkpoints/latest --output adapter
    mora-ds convert peft out/checkpoints/latest --output lora [--rank 64]
    mora-ds convert mora ADAPTER --output adapter             from a MoRA adapter of kongds's PEFT

Exit code 2: an error that you can correct in the command or the files; 1: a full disk.
"""

import argparse

from mora_ds.common.errors import named_as_flags
from mora_ds.runtime.cli import add_action, command_parser, say, shared_flags

_ACTIONS = {
    "adapter": "write the MoRA matrices and the merge ledger only, for mora_ds.load_adapter",
    "mora": "read a MoRA adapter of kongds's fork of PEFT, or of axolotl, and write it as one of mora_ds",
    "peft": "write a LoRA adapter that PEFT and vLLM load; exact where the update's rank is bounded",
}


@named_as_flags("output", "rank", "domain", "target_modules", base_folder="--base")
def main() -> None:
    options = _parser().parse_args()
    from mora_ds.deploy.adapter_io import export_adapter
    from mora_ds.deploy.fork_adapters import convert_fork
    from mora_ds.deploy.peft_export import export_peft

    if options.action == "adapter":
        lines = export_adapter(options.path, options.output)
    elif options.action == "mora":
        lines = convert_fork(options.path, options.output, options.base)
    else:
        lines = export_peft(
            options.path, options.output, options.rank, options.base, options.domain
        )
    say(*lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="|".join(_ACTIONS)
    )
    for name, text in _ACTIONS.items():
        action = add_action(actions, name, text)
        path = "the checkpoint, or with mora the adapter's folder, to convert"
        shared_flags(action, "path", help=path)
        shared_flags(action, "--output")
    shared_flags(actions.choices["mora"], "--base")
    peft = actions.choices["peft"]
    peft.add_argument(
        "--rank",
        type=int,
        help="largest rank of a layer. Default: as large as an exact adapter takes",
    )
    shared_flags(peft, "--base", "--domain")
    return parser
