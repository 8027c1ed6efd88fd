"""The runs in a JSON of `tools/bench/learning.py`, together by what they have in
common."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mora_ds.common.files import read_json


@dataclass(frozen=True)
class Row:
    """The runs of a method at one rank and one learning rate: one for each seed."""

    method: str
    rank: int
    """0 if it has none of the ranks that were compared."""
    rate: float
    runs: list[dict[str, Any]]

    @property
    def kind(self) -> tuple[str, int]:
        """The method and its rank, which have one best learning rate."""
        return self.method, self.rank

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return int(self.runs[0]["trained"])

    @property
    def seeds(self) -> set[int]:
        return {run["seed"] for run in self.runs}

    def perplexities(
        self, text: str, seeds: Collection[int] | None = None
    ) -> list[float]:
        """The perplexity of each seed on the text "new" or "old" after its run; or only of
        `seeds`."""
        return [
            run["perplexity"][text]
            for run in self.runs
            if seeds is None or run["seed"] in seeds
        ]

    def mean(self, text: str, seeds: Collection[int] | None = None) -> float:
        """The mean of `perplexities`."""
        return fmean(self.perplexities(text, seeds))

    def score(self, task: str) -> float:
        """The mean share of right answers on a task of `--tasks`."""
        return fmean(run["scores"][task] for run in self.runs)

    def cost(self, name: str) -> float:
        """The mean of what each run kept as cost under this name."""
        return fmean(run["cost"][name] for run in self.runs)


def rows_of(runs: Iterable[dict[str, Any]]) -> list[Row]:
    """A row for each method, rank and learning rate, in the order of the runs."""
    by_kind: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for run in runs:
        key = (run["method"], run.get("rank", 0), run["learning_rate"])
        by_kind.setdefault(key, []).append(run)
    return [Row(*key, alike) for key, alike in by_kind.items()]


def best_rows(path: Path) -> list[Row]:
    """The methods of a JSON, each at its best learning rate."""
    return rows_of(run for run in read_json(path)["runs"] if run["is_best"])
