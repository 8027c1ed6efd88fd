"""Convert a checkpoint to DeepSpeed's universal format, back from it, or to an adapter without its run.

    mora-ds convert universal out/checkpoints/latest --output universal
    mora-ds convert from_universal universal --output back/step-000100
    mora-ds convert adapter out/checkpoints/latest --output adapter

Exit code 2: an error that you can correct in the command or the files; 1: a full disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mora_ds.checkpoint.universal import from_universal, to_universal
from mora_ds.deploy.adapter_io import export_adapter

_ACTIONS = {
    "universal": (
        to_universal,
        "write the format that DeepSpeed loads with load_universal, on any number of processes",
    ),
    "from_universal": (from_universal, "write a checkpoint from the output of `universal`"),
    "adapter": (export_adapter, "write the MoRA matrices and the merge ledger only, for mora_ds.load_adapter"),
}


def main() -> None:
    options = _parser().parse_args()
    convert, _ = _ACTIONS[options.action]
    print("\n".join(convert(options.path, options.output)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(_ACTIONS))
    for name, (_, text) in _ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        action.add_argument("path", type=Path, help="the checkpoint to convert")
        action.add_argument("--output", type=Path, required=True, help="folder to write; must be new")
    return parser
