"""Measure singular values and ranks of a run's merged update, for each layer and cycle.

Each delta (d_out, d_in) is computed and decomposed in float64 (`mora-ds spectrum`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from mora_ds.adapters.ops.spec import Update, additive
from mora_ds.checkpoint.adapter_files import AdapterTensors, read_adapter
from mora_ds.checkpoint.layout import LedgerLocation
from mora_ds.common.errors import UserError, nearest
from mora_ds.runtime.cli import table
from mora_ds.runtime.node_memory import require_memory

_FP32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Spectrum:
    """The sum of a layer's deltas after one cycle, with singular values s_1 >= s_2 >=
    ..., and the contribution of the cycle."""

    rank: int
    """Number of s_i above s_1 * max(d_out, d_in) * eps of fp32, the precision of M."""
    stable_rank: float
    """sum of s_i^2 / s_1^2; 0 for zeros."""
    new_span: float
    """The fraction, 0 to 1, of the newest delta's energy (squared norm) outside the span
    of the earlier ones, that is outside of the row space or the column space of their
    sum. 0 if that sum has full rank (rotate and decouple: after one cycle)."""


@dataclass(frozen=True)
class Row:
    """One layer after one cycle."""

    layer: str
    cycle: int
    step: int
    is_live: bool
    """Whether this is the current cycle, which is not merged yet."""
    side: int
    """min(d_in, d_out), the maximum rank of the layer."""
    spectrum: Spectrum


def layer_spectra(updates: Sequence[Update]) -> Iterator[Spectrum]:
    """The spectrum after each of a layer's `updates`, in order, in float64."""
    spec, _ = updates[0]
    total = torch.zeros(spec.d_out, spec.d_in, dtype=torch.float64)
    # Orthonormal bases of the sum so far: (d_out, rank) of its column space,
    # (rank, d_in) of its row space.
    left = total[:, :0]
    right = total[:0]
    for spec, adapter_weight in updates:
        newest = additive(spec).delta_weight(adapter_weight.double())
        energy = newest.square().sum().item()
        inside = (left.T @ newest @ right.T).square().sum().item()
        total += newest
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        rank = int((values > values[0] * max(total.shape) * _FP32_EPS).sum())
        left = left[:, :rank]
        right = right[:rank]
        yield Spectrum(
            rank=rank,
            stable_rank=(values / values[0]).square().sum().item() if rank else 0.0,
            new_span=max(0.0, 1.0 - inside / energy) if energy else 0.0,
        )


def histories(
    module: str, updates: Iterable[Update]
) -> Iterator[tuple[str, list[Update]]]:
    """(name, updates) of every matrix of a layer; experts have several."""
    by_update = [
        list(spec.members(module, adapter_weight)) for spec, adapter_weight in updates
    ]
    for history in zip(*by_update, strict=True):
        name, _, _ = history[0]
        yield name, [(spec, mora_matrix) for _, spec, mora_matrix in history]


def spectra(location: LedgerLocation, pattern: str = "*") -> Iterator[Row]:
    """A row for each cycle of each layer in a ledger or checkpoint whose name matches
    the shell-style `pattern`; experts are separate layers. The MoRA matrices of one
    layer are in memory at a time. Raises `UserError` if no layer matches
    (`--layers`)."""
    ledger = location.ledger
    of_cycles = [ledger.layers(cycle) for cycle in range(ledger.cycles)]
    steps = [record.step for record in ledger.records]
    live = None
    if location.checkpoint is not None:
        adapter = read_adapter(location.checkpoint)
        adapter.check_ledger(ledger)
        live = AdapterTensors(location.checkpoint, adapter)
        of_cycles.append(adapter.layers)
        steps.append(adapter.step)
    known = list(dict.fromkeys(module for layers in of_cycles for module in layers))
    if not known:
        raise UserError(
            f"{ledger.folder} has no cycles: nothing was merged yet; give a checkpoint for its current matrices"
        )
    modules = [module for module in known if fnmatchcase(module, pattern)]
    if not modules:
        raise UserError(
            f"--layers {pattern!r} matches none of the {len(known)} layers.{nearest(pattern, known)}"
        )
    for module in modules:
        cycles = [cycle for cycle, layers in enumerate(of_cycles) if module in layers]
        updates = list(ledger.mora_matrices_of(module))
        if live is not None and module in of_cycles[-1]:
            operator = of_cycles[-1][module].operator
            updates.append((operator, live.mora_matrix(module)))
        for spec, _ in updates:
            # The size of a delta comes from a file, which may be wrong.
            what = f"{module}: a delta of {spec.d_out} x {spec.d_in}"
            require_memory(8 * spec.d_in * spec.d_out, what)
        for name, history in histories(module, updates):
            spec, _ = history[0]
            side = min(spec.d_in, spec.d_out)
            for cycle, spectrum in zip(cycles, layer_spectra(history), strict=True):
                is_live = cycle == ledger.cycles
                yield Row(name, cycle, steps[cycle], is_live, side, spectrum)


def spectrum_lines(rows: Sequence[Row]) -> list[str]:
    """Lines of a table with a row for each layer and cycle."""
    titles = "layer,cycle,step,rank,of,stable,new span"
    cells = [titles.split(",")]
    for row in rows:
        spectrum = row.spectrum
        cells.append(
            [
                row.layer,
                f"{row.cycle}{'*' if row.is_live else ''}",
                str(row.step),
                str(spectrum.rank),
                str(row.side),
                f"{spectrum.stable_rank:.1f}",
                f"{spectrum.new_span:.3f}",
            ]
        )
    return [
        *table(cells),
        "rank, stable: numerical and stable rank of the sum of deltas up to the cycle; of: min(d_in, d_out); new "
        "span: fraction of the cycle's energy outside the span of the earlier sum; *: the current, unmerged cycle",
    ]
