"""Norms, numerical rank and largest singular values of each cycle in a merge ledger, one line a cycle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.common.untrusted import require_memory
from mora_ds.eval.spectrum import Update, cumulative_norms, measure, singular_values
from mora_ds.remora.ledger import Ledger
from mora_ds.runtime.cli import table


@dataclass(frozen=True)
class CycleSummary:
    """One cycle of a ledger. Norms are Frobenius norms over all layers; the rest are means over layers."""

    cycle: int
    step: int
    layers: int
    operators: str
    """Such as "rotate/permuted", the most frequent first."""
    square_norm: float
    """Norm of the MoRA matrices M."""
    delta_norm: float
    """Norm of the deltas, the (d_out, d_in) matrices that the M stand for."""
    cumulative_norm: float
    """Norm of the sums of deltas up to and including this cycle."""
    rank: float
    """Numerical rank of a delta."""
    full_rank: float
    """min(d_in, d_out), the largest possible rank."""
    top_1: float
    """Share of a delta's energy that its largest singular value holds."""
    top_10_percent: float
    """Share that the largest tenth of its singular values holds."""
    nbytes: int


def summarize(ledger: Ledger) -> list[CycleSummary]:
    """The summary of every cycle. One MoRA matrix is decomposed at a time (see `spectrum`)."""
    for cycle in range(ledger.cycles):
        for name, entry in ledger.layers(cycle).items():
            require_delta(name, entry.operator)
    return [_summary(ledger, cycle, norm) for cycle, norm in enumerate(_norms_of_sums(ledger))]


def require_delta(module: str, spec: UpdateSpec) -> None:
    """Raises `UserError` where there is not the memory for a delta of a layer, whose size only its file states."""
    is_small = isinstance(spec, OperatorSpec) and not spec.blockwise  # then only its factors are formed (`spectrum`)
    elements = (spec.d_in + spec.d_out) * spec.value_shape[-1] if is_small else spec.d_in * spec.d_out
    require_memory(8 * elements, f"{module}: a delta of {spec.d_out} x {spec.d_in}")


def _summary(ledger: Ledger, cycle: int, cumulative_norm: float) -> CycleSummary:
    record, entries = ledger.records[cycle], ledger.layers(cycle)
    squares = [ledger.square(cycle, module) for module in entries]
    measures, specs = [], []
    for (module, entry), value in zip(entries.items(), squares, strict=True):
        for _, spec, square in entry.operator.members(module, value):
            measures.append(measure(singular_values(spec, square), max(spec.d_in, spec.d_out)))
            specs.append(spec)
    return CycleSummary(
        cycle=cycle,
        step=record.step,
        layers=len(entries),
        operators=", ".join(label for label, _ in Counter(spec.describe() for spec in specs).most_common()),
        square_norm=_total_norm(square.double().norm().item() for square in squares),
        delta_norm=_total_norm(each.norm for each in measures),
        cumulative_norm=cumulative_norm,
        rank=mean(each.rank for each in measures),
        full_rank=mean(min(spec.d_in, spec.d_out) for spec in specs),
        top_1=mean(each.top_1 for each in measures),
        top_10_percent=mean(each.top_10_percent for each in measures),
        nbytes=record.size,
    )


def _norms_of_sums(ledger: Ledger) -> list[float]:
    """The norm of the sums of deltas after each cycle; a layer that a cycle left out counts with its last sum."""
    energies = [0.0] * ledger.cycles
    for module in modules_of(ledger):
        cycles = [cycle for cycle in range(ledger.cycles) if module in ledger.layers(cycle)]
        for _, updates in histories(module, ledger.squares_of(module)):
            norms = cumulative_norms(updates)
            for start, end, norm in zip(cycles, [*cycles[1:], ledger.cycles], norms, strict=True):
                for cycle in range(start, end):
                    energies[cycle] += norm**2
    return [math.sqrt(energy) for energy in energies]


def histories(module: str, updates: Iterable[Update]) -> list[tuple[str, list[Update]]]:
    """(name, its updates) of every matrix that the updates of a layer change: of experts one after the other."""
    members = [list(spec.members(module, value)) for spec, value in updates]
    return [(each[0][0], [(spec, square) for _, spec, square in each]) for each in zip(*members, strict=True)]


def _total_norm(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))


def modules_of(ledger: Ledger) -> list[str]:
    """Every layer that some cycle adapted, in the order of its first appearance."""
    return list(dict.fromkeys(module for cycle in range(ledger.cycles) for module in ledger.layers(cycle)))


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; 0 for no values."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def show_lines(ledger: Ledger) -> list[str]:
    """The summary as a text table."""
    head = [f"{ledger.folder}: {ledger.cycles} cycle(s) on the base {ledger.base_fingerprint[:16]}..."]
    if not ledger.cycles:
        return head
    titles = ["cycle", "step", "layers", "operator", "|M|", "|delta|", "|sum|", "rank", "of", "top1", "top10%", "MiB"]
    rows = [
        [
            str(each.cycle), str(each.step), str(each.layers), each.operators, f"{each.square_norm:.4e}",
            f"{each.delta_norm:.4e}", f"{each.cumulative_norm:.4e}", f"{each.rank:.1f}", f"{each.full_rank:.1f}",
            f"{each.top_1:.3f}", f"{each.top_10_percent:.3f}", f"{each.nbytes / 2**20:.2f}",
        ]
        for each in summarize(ledger)
    ]  # fmt: skip
    legend = (
        "|M|, |delta|, |sum|: Frobenius norms over all layers, of the MoRA matrices, of their deltas, of all deltas so "
        "far; rank: numerical, of a delta, mean over layers, of min(d_in, d_out); top: share of the delta's energy"
    )
    return [*head, *table([titles, *rows]), legend]
