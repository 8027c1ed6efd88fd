"""Norms of each cycle in a merge ledger, one line a cycle. `mora-ds spectrum` has its ranks and singular values."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.common.untrusted import require_memory
from mora_ds.remora.ledger import Ledger
from mora_ds.runtime.cli import table

Update = tuple[UpdateSpec, Tensor]
"""(operator, M in fp32 (R, R)), or LoRA's spec and factors."""


@dataclass
class CycleSummary:
    """One cycle of a ledger. Squared norms are squared Frobenius norms, summed over all layers."""

    cycle: int
    step: int
    layers: int
    operators: str
    """Such as "rotate/permuted", the most frequent first."""
    nbytes: int
    square_energy: float = 0.0
    """Squared norm of the MoRA matrices M."""
    delta_energy: float = 0.0
    """Squared norm of the deltas, the (d_out, d_in) matrices that the M stand for."""


def summarize(ledger: Ledger) -> list[CycleSummary]:
    """The summary of every cycle. One delta is formed at a time."""
    summaries = []
    for cycle, record in enumerate(ledger.records):
        entries = ledger.layers(cycle)
        for module, entry in entries.items():
            require_delta(module, entry.operator)
        operators = Counter(entry.operator.describe() for entry in entries.values())
        names = ", ".join(label for label, _ in operators.most_common())
        summaries.append(CycleSummary(cycle, record.step, len(entries), names, record.size))
    for module in modules_of(ledger):
        merged = [summary for summary in summaries if module in ledger.layers(summary.cycle)]
        for _, updates in histories(module, ledger.squares_of(module)):
            for summary, (spec, value) in zip(merged, updates, strict=True):
                matrix = value.double()
                summary.square_energy += matrix.square().sum().item()
                summary.delta_energy += spec.delta_weight(matrix).square().sum().item()
    return summaries


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


def show_lines(ledger: Ledger) -> list[str]:
    """The summary as a text table."""
    head = [f"{ledger.folder}: {ledger.cycles} cycle(s) on the base {ledger.base_fingerprint[:16]}..."]
    if not ledger.cycles:
        return head
    rows = [["cycle", "step", "layers", "operator", "|M|", "|delta|", "MiB"]]
    for summary in summarize(ledger):
        norms = [math.sqrt(energy) for energy in (summary.square_energy, summary.delta_energy)]
        counts = [
            str(summary.cycle),
            str(summary.step),
            str(summary.layers),
            summary.operators,
        ]
        rows.append(
            [
                *counts,
                *(f"{norm:.4e}" for norm in norms),
                f"{summary.nbytes / 2**20:.2f}",
            ]
        )
    legend = (
        "|M|, |delta|: Frobenius norms over all layers, of the MoRA matrices and of their deltas; mora-ds spectrum "
        "shows those of all deltas so far, ranks and singular values"
    )
    return [*head, *table(rows), legend]
