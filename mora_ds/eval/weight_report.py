"""The analysis of a model's layers as text tables, JSON, and a heat map of layer types by blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_ds.adapters.target_modules import ending_of
from mora_ds.common.errors import UserError
from mora_ds.common.files import write_json_atomic
from mora_ds.eval.gradient_probe import GradientMeasures
from mora_ds.eval.ledger_summary import mean
from mora_ds.eval.weights import ESTIMATED, LEADING, SHARES, WeightMeasures
from mora_ds.runtime.cli import table

Gradients = Mapping[str, GradientMeasures]
"""Module -> result of the gradient probe; empty without a probe."""

_TITLES = ["d_in", "d_out", "norm", "s_1", "stable", "effective", "of full", *(f"{share:.0%}" for share in SHARES)]


def report_lines(rows: Sequence[WeightMeasures], gradients: Gradients) -> list[str]:
    """Tables of every layer, and of the means over layers of a type."""
    more = ["|dL/dM|", "|dL/dW|"] if gradients else []
    layers = [[row.module + ("*" if row.method == ESTIMATED else ""), *_cells([row], gradients)] for row in rows]
    types = [[name, str(len(layers)), *_cells(layers, gradients)] for name, layers in by_type(rows).items()]
    note = (
        "stable: |W|^2 / s_1^2; effective: exp of the entropy of s_i^2 / |W|^2, and as a share of the shorter side; "
        f"{', '.join(f'{share:.0%}' for share in SHARES)}: how many singular values hold that share of the energy"
    )
    if any(row.method == ESTIMATED for row in rows):
        note += f"; *: estimated from the leading {LEADING} values and the norm"
    if gradients:
        note += "; |dL/dM|, |dL/dW|: norms of gradients at M = 0, root mean square over batches"
    return [
        *table([["layer", *_TITLES, *more], *layers]), "", *table([["type", "layers", *_TITLES, *more], *types]), note
    ]  # fmt: skip


def by_type(rows: Sequence[WeightMeasures]) -> dict[str, list[WeightMeasures]]:
    """The layers by the last part of their names."""
    types: dict[str, list[WeightMeasures]] = {}
    for row in rows:
        types.setdefault(ending_of(row.module), []).append(row)
    return types


def _cells(rows: Sequence[WeightMeasures], gradients: Gradients) -> list[str]:
    cells = [
        f"{mean(row.d_in for row in rows):.0f}", f"{mean(row.d_out for row in rows):.0f}",
        f"{mean(row.norm for row in rows):.3e}", f"{mean(row.leading[0] for row in rows):.3e}",
        f"{mean(row.stable_rank for row in rows):.1f}", f"{mean(row.effective_rank for row in rows):.1f}",
        f"{mean(row.score for row in rows):.1%}",
        *(f"{mean(row.energy_ranks[index] for row in rows):.0f}" for index in range(len(SHARES))),
    ]  # fmt: skip
    if gradients:
        probed = [gradients[row.module] for row in rows if row.module in gradients]
        cells += [
            f"{mean(each.square_norm for each in probed):.3e}",
            f"{mean(each.weight_norm for each in probed):.3e}",
        ]
    return cells


def write_report(path: Path, model: str, rows: Sequence[WeightMeasures], gradients: Gradients) -> None:
    """Writes every measure of every layer as JSON, atomically."""
    layers = [
        {**row.to_dict(), **({"gradients": gradients[row.module].to_dict()} if row.module in gradients else {})}
        for row in rows
    ]
    write_json_atomic(path, {"format": 1, "model": model, "energy_shares": list(SHARES), "layers": layers})


# -- the heat map ------------------------------------------------------------------------------------------------------


def heat_map(scores: Mapping[str, float]) -> tuple[list[str], list[int], list[list[float]]]:
    """(types, blocks, mean score of each type in each block, NaN without layers). The block is the first number in a
    layer's name, 0 without one."""
    cells: dict[tuple[str, int], list[float]] = {}
    for name, score in scores.items():
        number = re.search(r"\.(\d+)\.", f".{name}.")
        cells.setdefault((ending_of(name), int(number[1]) if number else 0), []).append(score)
    types = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    return types, blocks, [[mean(cells.get((kind, block), [math.nan])) for block in blocks] for kind in types]


def write_heat_map(path: Path, rows: Sequence[WeightMeasures], gradients: Gradients) -> None:
    """Writes a PNG: effective rank as a share of the full rank, and the probe's scores below it. Raises `UserError`
    without matplotlib."""
    pyplot = require_matplotlib()
    maps = {"effective rank / shorter side": {row.module: row.score for row in rows}}
    if gradients:
        maps["root mean square of dL/dM"] = {name: each.score for name, each in gradients.items()}
    types, blocks, _ = heat_map(maps["effective rank / shorter side"])
    size = (max(6.0, 0.3 * len(blocks) + 2), (1.2 + 0.35 * len(types)) * len(maps))
    figure, axes = pyplot.subplots(len(maps), figsize=size, layout="constrained", squeeze=False)
    for axis, (title, scores) in zip(axes[:, 0], maps.items(), strict=True):
        kinds, numbers, values = heat_map(scores)
        image = axis.imshow(values, aspect="auto")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(numbers)), numbers, fontsize=6)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axis.set_xlabel("block", fontsize=7)
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def require_matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("--png needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
