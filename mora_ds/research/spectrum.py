"""Measure the singular values and ranks of the merged update of a run, for each layer and cycle.

    mora-ds spectrum out/checkpoints/latest --json spectrum.json

The argument is a ledger folder, a checkpoint (its current MoRA matrices come last), or the output folder of a run. Each
delta is formed, (d_out, d_in) in float64, and decomposed: for wide layers, select some with --layers, or use a GPU with
--device cuda. Exit code 2: an error that you can correct.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.checkpoint.adapter_files import AdapterTensors, live_adapter
from mora_ds.checkpoint.layout import LedgerLocation, find_ledger
from mora_ds.common.errors import POSITIVE, UserError, nearest, refuse, wrong_values
from mora_ds.common.files import write_json_atomic
from mora_ds.common.untrusted import require_memory
from mora_ds.remora.ledger import Ledger
from mora_ds.runtime.cli import check_device, check_writable, command_parser, shared_flags, table

THRESHOLD = 0.1
"""The MoRA paper's figure 5 counts singular values above it."""

_FP32_EPS = torch.finfo(torch.float32).eps

Update = tuple[UpdateSpec, Tensor]
"""(operator, M in fp32 (R, R)), or LoRA's spec and factors."""


def main() -> None:
    options = _parser().parse_args()
    refuse(wrong_values(options, {"threshold": POSITIVE}))
    check_writable("--json", options.json)
    check_device(options.device)
    rows = list(
        spectra(
            find_ledger(options.path),
            options.layers,
            options.threshold,
            options.device,
        )
    )
    if options.json:
        content = {"format": 1, "threshold": options.threshold, "rows": [asdict(row) for row in rows]}
        write_json_atomic(options.json, content)
    print("\n".join(spectrum_lines(rows, options.threshold)))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument(
        "path",
        type=Path,
        help="ledger folder, checkpoint, or a run's output folder",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="count singular values above it",
    )
    parser.add_argument(
        "--layers",
        default="*",
        help="pattern over module names, such as '*.q_proj'",
    )
    shared_flags(parser, "--json", "--device")
    return parser


# -- what a ledger holds ----------------------------------------------------------------------------------------------


def require_delta(module: str, spec: UpdateSpec) -> None:
    """Raises `UserError` where there is not the memory for a delta of a layer, whose size only its file states."""
    require_memory(8 * spec.d_in * spec.d_out, f"{module}: a delta of {spec.d_out} x {spec.d_in}")


def histories(module: str, updates: Iterable[Update]) -> list[tuple[str, list[Update]]]:
    """(name, its updates) of every matrix that the updates of a layer change: of experts one after the other."""
    members = [list(spec.members(module, value)) for spec, value in updates]
    return [(history[0][0], [(spec, square) for _, spec, square in history]) for history in zip(*members, strict=True)]


def modules_of(ledger: Ledger) -> list[str]:
    """Every layer that some cycle adapted, in the order of its first appearance."""
    return list(dict.fromkeys(module for cycle in range(ledger.cycles) for module in ledger.layers(cycle)))


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; 0 for no values."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


# -- measures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """Summary of a matrix's singular values s_1 >= s_2 >= ...; all 0 for the zero matrix."""

    norm: float
    """Frobenius norm: the root of the sum of s_i^2."""
    largest: float
    """s_1."""
    above: int
    """How many exceed the threshold."""
    stable_rank: float
    """sum of s_i^2 / s_1^2."""
    effective_rank: float
    """exp of the entropy of s_i / sum of s_i (Roy & Vetterli 2007)."""
    rank: int
    """How many exceed s_1 * max(d_out, d_in) * eps of fp32, the precision in which M is stored."""


def measure(values: Tensor, longest_side: int, threshold: float = THRESHOLD) -> Measures:
    """The summary of `values`, all singular values, descending. `longest_side`: max(d_out, d_in)."""
    largest = values[0].item()
    if largest == 0.0:
        return Measures(0.0, 0.0, 0, 0.0, 0.0, 0)
    energy = (values / largest).square()
    shares = values / values.sum()
    return Measures(
        norm=values.norm().item(),
        largest=largest,
        above=int((values > threshold).sum()),
        stable_rank=energy.sum().item(),
        effective_rank=torch.special.entr(shares).sum().exp().item(),
        rank=_rank(values, longest_side),
    )


def _rank(values: Tensor, longest_side: int) -> int:
    return int((values > values[0] * longest_side * _FP32_EPS).sum())


@dataclass(frozen=True)
class LayerSpectrum:
    """A layer after one cycle."""

    newest: Measures
    """Summary of this cycle's delta alone."""
    cumulative: Measures
    """Summary of the sum of all deltas so far."""
    outside_span: float
    """The share, 0 to 1, of the newest delta's energy (squared norm) outside the span of the earlier ones: what does
    not both read from the row space and write to the column space of their sum. 0 as soon as that sum has full rank
    (rotate and decouple: after one cycle)."""


def layer_spectra(updates: Sequence[Update], threshold: float = THRESHOLD) -> Iterator[LayerSpectrum]:
    """The spectrum after each of a layer's `updates`, in their order, computed on the device of the M in float64."""
    total: Tensor | float = 0.0
    left = right = None
    for spec, value in updates:
        newest = spec.delta_weight(value.double())
        outside_span = _outside_span(newest, left, right)
        total = total + newest
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        longest = max(newest.shape)
        rank = _rank(values, longest)
        left = left[:, :rank]
        right = right[:rank]
        alone = measure(torch.linalg.svdvals(newest), longest, threshold)
        yield LayerSpectrum(alone, measure(values, longest, threshold), outside_span)


def _outside_span(newest: Tensor, left: Tensor | None, right: Tensor | None) -> float:
    """`left` (d_out, rank), `right` (rank, d_in): orthonormal bases of the column and row space of the earlier sum;
    None before the first cycle."""
    energy = newest.square().sum().item()
    if energy == 0.0:
        return 0.0
    if left is None or right is None:
        return 1.0
    inside = (left.T @ newest @ right.T).square().sum().item()
    return min(1.0, max(0.0, 1.0 - inside / energy))


# -- a ledger ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The spectrum of one layer after one cycle."""

    module: str
    cycle: int
    step: int
    operator: str
    """Kind and grouping, such as rotate/permuted."""
    is_live: bool
    """Whether this is the running cycle, which is not merged yet."""
    d_in: int
    d_out: int
    r_hat: int
    """Side of M, or LoRA's rank."""
    spectrum: LayerSpectrum


def spectra(
    location: LedgerLocation,
    pattern: str = "*",
    threshold: float = THRESHOLD,
    device: str = "cpu",
) -> Iterator[Row]:
    """The rows of a ledger's or a checkpoint's layers whose names match the shell-style `pattern`: one a cycle, of
    experts one after the other; computed on `device`, with the MoRA matrices of one layer in memory at a time. Raises
    `UserError` when it matches no layer (`--layers`)."""
    ledger = location.open()
    adapter = live_adapter(location)
    tensors = None
    if location.checkpoint is not None and adapter is not None:
        tensors = AdapterTensors(location.checkpoint, adapter)
    known = list(dict.fromkeys([*modules_of(ledger), *(adapter.layers if adapter else ())]))
    if not known:
        raise UserError(
            f"{location.ledger} has no cycles: nothing was merged yet; name a checkpoint to see its live matrices"
        )
    modules = [module for module in known if fnmatchcase(module, pattern)]
    if not modules:
        raise UserError(f"--layers {pattern!r} matches none of the {len(known)} layers.{nearest(pattern, known)}")
    for module in tqdm(modules, unit="layer", disable=not sys.stderr.isatty()):
        cycles = [cycle for cycle in range(ledger.cycles) if module in ledger.layers(cycle)]
        origins = [(cycle, ledger.records[cycle].step, False) for cycle in cycles]
        updates = list(ledger.squares_of(module))
        if adapter is not None and tensors is not None and module in adapter.layers:
            origins.append((ledger.cycles, adapter.step, True))
            updates.append((adapter.layers[module].operator, tensors.square(module)))
        for spec, _ in updates:
            require_delta(module, spec)
        for name, history in histories(module, updates):
            moved = [(spec, value.to(device)) for spec, value in history]
            for (spec, _), origin, spectrum in zip(moved, origins, layer_spectra(moved, threshold), strict=True):
                cycle, step, is_live = origin
                size = spec.value_shape[0]
                yield Row(
                    name,
                    cycle,
                    step,
                    spec.describe(),
                    is_live,
                    spec.d_in,
                    spec.d_out,
                    size,
                    spectrum,
                )


# -- for reading -------------------------------------------------------------------------------------------------------


def spectrum_lines(rows: Sequence[Row], threshold: float) -> list[str]:
    """Tables of the layers after their last cycle, and of means over layers for each cycle."""
    titles = ["rank", "of", f">{threshold:g}", "stable", "effective", "|delta|", "|sum|", "new span"]
    last = {row.module: row for row in rows}
    layers = [[name, _cycle(row), *_cells([row])] for name, row in last.items()]
    by_cycle: dict[int, list[Row]] = {}  # not by step: a checkpoint that was saved at a merge is of two cycles' step
    for row in sorted(rows, key=lambda row: row.cycle):
        by_cycle.setdefault(row.cycle, []).append(row)
    cycles = [
        [_cycle(members[0]), str(members[0].step), str(len(members)), *_cells(members)] for members in by_cycle.values()
    ]
    live = "; *: the running cycle, not merged yet" if any(row.is_live for row in rows) else ""
    return [
        *table([["layer", "cycle", *titles], *layers]),
        "",
        *table([["cycle", "step", "layers", *titles], *cycles]),
        "of the sum of deltas up to the cycle: numerical rank of min(d_in, d_out), singular values above the threshold,"
        " stable and effective rank; |delta|: norm of the cycle's delta; new span: share of its energy outside the span"
        " of the earlier sum" + live,
    ]


def _cycle(row: Row) -> str:
    return f"{row.cycle}{'*' if row.is_live else ''}"


def _cells(rows: Sequence[Row]) -> list[str]:
    """The means over `rows` of what a table shows."""
    sums = [row.spectrum.cumulative for row in rows]
    ranks = [
        mean(measures.rank for measures in sums),
        mean(min(row.d_in, row.d_out) for row in rows),
        mean(measures.above for measures in sums),
        mean(measures.stable_rank for measures in sums),
        mean(measures.effective_rank for measures in sums),
    ]
    norms = [mean(row.spectrum.newest.norm for row in rows), mean(measures.norm for measures in sums)]
    outside_span = mean(row.spectrum.outside_span for row in rows)
    return [*(f"{value:.1f}" for value in ranks), *(f"{value:.3e}" for value in norms), f"{outside_span:.3f}"]
