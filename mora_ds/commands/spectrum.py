"""Measure singular values and ranks of a run's merged update, by layer and cycle.

    mora-ds spectrum out/checkpoints/latest --layers '*.q_proj' --json spectrum.json

The argument is a ledger folder, a checkpoint (its current MoRA matrices come last), or
the output folder of a run. Each delta is formed, (d_out, d_in) in float64, and
decomposed: for wide layers, select some with --layers. Exit code 2: an error that you
can correct.
"""

import argparse
from dataclasses import asdict

from mora_ds.runtime.cli import (
    check_writable,
    command_parser,
    record_and_say,
    shared_flags,
)


def main() -> None:
    options = _parser().parse_args()
    check_writable("--json", options.json)
    from mora_ds.checkpoint.layout import find_ledger
    from mora_ds.research.spectrum import spectra, spectrum_lines

    rows = list(spectra(find_ledger(options.path), options.layers))
    content = [asdict(row) for row in rows]
    record_and_say(options.json, content, spectrum_lines(rows))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    shared_flags(parser, "path")
    parser.add_argument(
        "--layers", default="*", help="pattern over module names, such as '*.q_proj'"
    )
    shared_flags(parser, "--json")
    return parser
