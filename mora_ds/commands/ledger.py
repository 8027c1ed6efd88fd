"""Show or sum merge ledgers, which record the MoRA matrices of every merged cycle of a
run.

    mora-ds ledger show out                                      every cycle
    mora-ds ledger combine law medicine --weights 0.5 0.5 --output both      a weighted sum of runs of one base

`mora-ds verify` checks them. Exit code 2: an error that you can correct in the command;
1: damaged files, a full disk.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mora_ds.common.errors import named_as_flags
from mora_ds.runtime.cli import add_action, command_parser, say, shared_flags, table

if TYPE_CHECKING:
    from mora_ds.remora.ledger import Ledger


@named_as_flags("output", "weights", "target_modules", base_folder="--base")
def main() -> None:
    options = _parser().parse_args()
    from mora_ds.checkpoint.layout import find_ledger
    from mora_ds.deploy.combine import combine_adapters

    if options.action == "show":
        lines = _cycles(find_ledger(options.path).ledger)
    else:
        lines = combine_adapters(
            options.path, options.weights, options.output, options.base
        )
    say(*lines)


def _cycles(ledger: Ledger) -> list[str]:
    """One line a cycle, below the base that they are of."""
    rows = [["cycle", "step", "layers", "operator", "MiB"]]
    for record in ledger.records:
        layers = ledger.layers(record.cycle)
        operators = sorted({layer.operator.describe() for layer in layers.values()})
        counts = [str(record.cycle), str(record.step), str(len(layers))]
        rows.append([*counts, ", ".join(operators), f"{record.size / 2**20:.2f}"])
    head = f"{ledger.folder}: {ledger.cycles} cycle(s) on the base {ledger.base_fingerprint[:16]}..."
    return [head, *table(rows)]


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="show|combine"
    )
    show = add_action(actions, "show", "list the cycles")
    shared_flags(show, "path")
    combine = add_action(
        actions,
        "combine",
        "write an adapter that is a weighted sum of others of the same base",
    )
    sources = "checkpoints, exported adapters or output folders of runs"
    shared_flags(combine, "path", nargs="+", help=sources)
    combine.add_argument(
        "--weights",
        type=float,
        nargs="+",
        required=True,
        help="one for each, in the same order",
    )
    shared_flags(combine, "--output", "--base")
    return parser
