"""Show, verify, edit, compact or sum merge ledgers, which record the MoRA matrices of every merged cycle of a run.

    mora-ds ledger show out                                      every cycle with its norms
    mora-ds ledger verify out/checkpoints/latest --base MODEL    hashes, their chain, the base
    mora-ds ledger drop out/checkpoints/latest --cycles 3 --output without-3
    mora-ds ledger compact out --output compacted                merge all cycles into compacted/base
    mora-ds ledger combine law medicine --weights 0.5 0.5 --output both      a weighted sum of runs of one base

The argument is a ledger folder, a checkpoint, or the output folder of a run. Exit code 2: an error that you can correct
in the command; 1: damaged files, a full disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mora_ds.checkpoint.compact import compact
from mora_ds.checkpoint.layout import find_ledger
from mora_ds.checkpoint.ledger_tools import drop, verify
from mora_ds.deploy.combine import combine_adapters
from mora_ds.eval.ledger_summary import show_lines
from mora_ds.models.tensor_files import COMPUTE_DTYPES


def main() -> None:
    options = _parser().parse_args()
    if options.action == "show":
        lines = show_lines(find_ledger(options.path).open())
    elif options.action == "verify":
        lines = verify(options.path, options.base)
    elif options.action == "drop":
        lines = drop(options.path, options.cycles, options.output, options.in_place)
    elif options.action == "combine":
        lines = combine_adapters(options.path, options.weights, options.output, options.base)
    else:
        lines = compact(options.path, options.output, options.first, options.dtype, options.base, options.max_shard_gib)
    print("\n".join(lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(_ACTIONS))
    by_name = {}
    for name, text in _ACTIONS.items():
        by_name[name] = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name != "combine":
            by_name[name].add_argument("path", type=Path, help="ledger folder, checkpoint, or a run's output folder")
    by_name["verify"].add_argument("--base", type=Path, help="the base's folder, to check that it is the right one")
    drop_flags, fold_flags = by_name["drop"], by_name["compact"]
    drop_flags.add_argument("--cycles", type=int, nargs="+", required=True, help="numbers as `show` gives them")
    where = drop_flags.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, help="folder to write; must be new or empty")
    where.add_argument("--in_place", action="store_true", help="replace the ledger; the old one is kept next to it")
    fold_flags.add_argument("--output", type=Path, required=True, help="folder to write; must be new or empty")
    fold_flags.add_argument(
        "--first", type=int, help="number of cycles to merge into the base, from the first on; default: all"
    )
    fold_flags.add_argument(
        "--dtype", choices=COMPUTE_DTYPES, default="float32", help="dtype of the new base; all but float32 round it"
    )
    fold_flags.add_argument("--base", type=Path, help="where the base lies now, if it was moved")
    fold_flags.add_argument("--max_shard_gib", type=float, default=5.0, help="largest weight file in GiB")
    sum_flags = by_name["combine"]
    sum_flags.add_argument(
        "path", type=Path, nargs="+", help="checkpoints, exported adapters or output folders of runs"
    )
    sum_flags.add_argument("--weights", type=float, nargs="+", required=True, help="one for each, in the same order")
    sum_flags.add_argument("--output", type=Path, required=True, help="folder to write; must be new or empty")
    sum_flags.add_argument("--base", type=Path, help="where the base lies now, if it was moved")
    return parser


_ACTIONS = {
    "show": "list the cycles with their norms",
    "verify": "check every hash, their chain, and the base",
    "drop": "write a ledger without some cycles",
    "compact": "merge the first cycles into a new base",
    "combine": "write an adapter that is a weighted sum of others of the same base",
}
