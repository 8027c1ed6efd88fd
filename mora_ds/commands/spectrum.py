"""Measure the singular values and ranks of the merged update of a run, for each layer and cycle.

    mora-ds spectrum out/checkpoints/latest --json spectrum.json --tensorboard out/tensorboard

The argument is a ledger folder, a checkpoint (its current MoRA matrices come last), or the output folder of a run. For
wide layers, select some with --layers, or use a GPU with --device cuda. Exit code 2: an error that you can correct.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from mora_ds.checkpoint.layout import find_ledger
from mora_ds.common.errors import POSITIVE, UserError
from mora_ds.eval.spectrum import THRESHOLD
from mora_ds.eval.spectrum_report import (
    Spectra,
    check_writable,
    require_matplotlib,
    spectrum_lines,
    torch_device,
    write_board,
    write_json,
    write_png,
)


def main() -> None:
    options = _parser().parse_args()
    if not POSITIVE.allow(options.threshold):
        raise UserError(f"--threshold must be {POSITIVE}, got {options.threshold:g}")
    check_writable("--json", options.json)
    check_writable("--png", options.png)
    if options.png:
        require_matplotlib()
    device, spectra = torch_device(options.device), Spectra(find_ledger(options.path), options.layers)
    progress = tqdm(spectra.modules, unit="layer", disable=not sys.stderr.isatty())
    rows = [row for module in progress for row in spectra.rows(module, options.threshold, device)]
    if options.json:
        write_json(options.json, rows, options.threshold)
    if options.tensorboard:
        write_board(options.tensorboard, rows)
    if options.png:
        write_png(options.png, rows, options.threshold)
    print("\n".join(spectrum_lines(rows, options.threshold)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("path", type=Path, help="ledger folder, checkpoint, or a run's output folder")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="count singular values above it")
    parser.add_argument("--layers", default="*", help="pattern over module names, such as '*.q_proj'")
    parser.add_argument("--json", type=Path, help="file for all measures of all layers and cycles")
    parser.add_argument("--tensorboard", type=Path, help="folder for curves over steps")
    parser.add_argument("--png", type=Path, help="file for the paper's figure 5; needs matplotlib")
    parser.add_argument("--device", default="cpu", help="where to decompose, such as cuda")
    return parser
