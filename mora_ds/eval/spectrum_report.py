"""The spectra of a merge ledger as text tables, JSON, TensorBoard curves and the paper's figure 5 as PNG.

merge ledger (+ a checkpoint's live MoRA matrices) -> rows, layer by layer -> spectrum_lines, write_json, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from mora_ds.checkpoint.adapter_files import AdapterTensors
from mora_ds.checkpoint.layout import LedgerLocation
from mora_ds.checkpoint.ledger_tools import live_adapter
from mora_ds.common.errors import UserError, nearest
from mora_ds.common.files import write_json_atomic
from mora_ds.eval.ledger_summary import histories, mean, modules_of, require_delta
from mora_ds.eval.spectrum import THRESHOLD, LayerSpectrum, Update, layer_spectra
from mora_ds.runtime.cli import table

Live = dict[str, Update]
"""Module -> (operator, M) of the running cycle, which is not merged yet."""


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Spectra:
    """The spectra of a ledger's or a checkpoint's layers. MoRA matrices are read when a layer's rows are asked for."""

    def __init__(self, location: LedgerLocation, pattern: str = "*") -> None:
        """`pattern`: shell-style, over module names. Raises `UserError` when it matches no layer (`--layers`)."""
        self._ledger, self._live, self._live_step = location.open(), Live(), 0
        adapter = live_adapter(location)
        if location.checkpoint is not None and adapter is not None:
            tensors, self._live_step = AdapterTensors.open(location.checkpoint, adapter), adapter.step
            self._live = {name: (entry.operator, tensors.square(name)) for name, entry in adapter.layers.items()}
        known = list(dict.fromkeys([*modules_of(self._ledger), *self._live]))
        if not known:
            raise UserError(
                f"{location.ledger} has no cycles: nothing was merged yet; name a checkpoint to see its live matrices"
            )
        self.modules = [module for module in known if fnmatchcase(module, pattern)]
        if not self.modules:
            raise UserError(f"--layers {pattern!r} matches none of the {len(known)} layers.{nearest(pattern, known)}")

    def rows(self, module: str, threshold: float = THRESHOLD, device: torch.device | str = "cpu") -> Iterator[Row]:
        """A layer's rows, one a cycle, of experts one after the other; computed on `device`."""
        cycles = [cycle for cycle in range(self._ledger.cycles) if module in self._ledger.layers(cycle)]
        origins = [(cycle, self._ledger.records[cycle].step, False) for cycle in cycles]
        updates = list(self._ledger.squares_of(module))
        if module in self._live:
            origins.append((self._ledger.cycles, self._live_step, True))
            updates.append(self._live[module])
        for spec, _ in updates:
            require_delta(module, spec)
        for name, history in histories(module, updates):
            moved = [(spec, value.to(device)) for spec, value in history]
            spectra = layer_spectra(moved, threshold)
            for (spec, _), (cycle, step, is_live), spectrum in zip(moved, origins, spectra, strict=True):
                size = spec.value_shape[0]
                yield Row(name, cycle, step, spec.describe(), is_live, spec.d_in, spec.d_out, size, spectrum)


# -- for reading -------------------------------------------------------------------------------------------------------


def spectrum_lines(rows: Sequence[Row], threshold: float) -> list[str]:
    """Tables of the layers after their last cycle, and of means over layers for each cycle."""
    titles = ["rank", "of", f">{threshold:g}", "stable", "effective", "|delta|", "|sum|", "new span", "new reach"]
    last = {row.module: row for row in rows}
    layers = [[name, _cycle(row), *_cells([row])] for name, row in last.items()]
    cycles = []
    for cycle in sorted({row.cycle for row in rows}):
        members = [row for row in rows if row.cycle == cycle]
        cycles.append([_cycle(members[0]), str(members[0].step), str(len(members)), *_cells(members)])
    live = "; *: the running cycle, not merged yet" if any(row.is_live for row in rows) else ""
    return [
        *table([["layer", "cycle", *titles], *layers]),
        "",
        *table([["cycle", "step", "layers", *titles], *cycles]),
        "of the sum of deltas up to the cycle: numerical rank of min(d_in, d_out), singular values above the threshold,"
        " stable and effective rank; |delta|: norm of the cycle's delta; new: share of its energy outside the span of "
        "the earlier sum, outside all that the earlier operators can express" + live,
    ]


def _cycle(row: Row) -> str:
    return f"{row.cycle}{'*' if row.is_live else ''}"


def _cells(rows: Sequence[Row]) -> list[str]:
    spectra = [row.spectrum for row in rows]
    means = [mean(column) for column in zip(*(_figures(each).values() for each in spectra), strict=True)]
    above, stable, effective, rank, norm, newest, span, reach = means
    full = mean(min(row.d_in, row.d_out) for row in rows)
    return [
        f"{rank:.1f}", f"{full:.1f}", f"{above:.1f}", f"{stable:.1f}", f"{effective:.1f}",
        f"{newest:.3e}", f"{norm:.3e}", f"{span:.3f}", f"{reach:.3f}",
    ]  # fmt: skip


def _figures(spectrum: LayerSpectrum) -> dict[str, float]:
    """Name of the curve -> value, as plotted."""
    total = spectrum.cumulative
    return {
        "values_above_threshold": total.above,
        "stable_rank": total.stable_rank,
        "effective_rank": total.effective_rank,
        "rank": total.rank,
        "norm": total.norm,
        "newest_norm": spectrum.newest.norm,
        "newest_outside_span": spectrum.outside_span,
        "newest_outside_reach": spectrum.outside_reach,
    }


# -- for programs and pages --------------------------------------------------------------------------------------------


def write_json(path: Path, rows: Sequence[Row], threshold: float) -> None:
    """Writes every row with every measure, atomically."""
    write_json_atomic(path, {"format": 1, "threshold": threshold, "rows": [row.to_dict() for row in rows]})


def write_board(folder: Path, rows: Sequence[Row]) -> None:
    """Writes TensorBoard curves over steps: means over layers in spectrum/, each layer in spectrum_of_layers/."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as board:
        for row in rows:
            for name, value in _figures(row.spectrum).items():
                board.add_scalar(f"spectrum_of_layers/{name}/{row.module}", value, row.step)
        for cycle in sorted({row.cycle for row in rows}):  # not step: one saved at a merge is the step of two cycles
            members = [row for row in rows if row.cycle == cycle]
            figures = [_figures(row.spectrum) for row in members]
            for name in figures[0]:
                board.add_scalar(f"spectrum/{name}", mean(each[name] for each in figures), members[0].step)


def require_matplotlib(flag: str = "--png") -> Any:
    """matplotlib.pyplot, drawing to files only. Raises `UserError`, which names `flag`, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{flag} needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write_png(path: Path, rows: Sequence[Row], threshold: float) -> None:
    """Plots the MoRA paper's figure 5: singular values above the threshold, layer by layer, a curve a cycle."""
    pyplot = require_matplotlib()
    modules = list(dict.fromkeys(row.module for row in rows))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.18 * len(modules)), 4.5), layout="constrained")
    for cycle in sorted({row.cycle for row in rows}):
        heights = {row.module: row.spectrum.cumulative.above for row in rows if row.cycle == cycle}
        places = [modules.index(module) for module in heights]
        axes.plot(places, list(heights.values()), marker=".", label=f"cycle {cycle}")
    axes.set_xticks(range(len(modules)), modules, rotation=90, fontsize=6)
    axes.set_ylabel(f"singular values > {threshold:g}")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def torch_device(name: str) -> torch.device:
    """The device of that name. Raises `UserError`, which names --device, where torch has none."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error


def check_writable(flag: str, path: Path | None) -> None:
    """Raises `UserError`, which names `flag`, where its file could not be written. To be called before the work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"{flag} {path}: name a file in a folder that exists")
