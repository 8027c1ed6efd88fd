"""The rows and cells of the tables that the documentation and the benchmarks show."""

from collections.abc import Iterable, Sequence
from statistics import fmean

_BAR = r"\|"


def cell(text: str) -> str:
    """Text for a table's cell: one line, in which <file>, pipes and stars are
    escaped."""
    return (
        " ".join(text.split())
        .replace("|", _BAR)
        .replace("<", "&lt;")
        .replace("*", "\\*")
    )


def table_row(*cells: str) -> str:
    """A row of a Markdown table. A bar within a cell would end it."""
    return f"|{' |'.join(cell.replace('|', _BAR) for cell in cells)}|"


def ruler(columns: int, alignment: str = "---") -> str:
    """The line below the titles. `alignment`: Markdown's, of all columns but the
    first."""
    return f"|---|{f'{alignment}|' * (columns - 1)}"


def number_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns but the first are flush right."""
    body = [table_row(*row) for row in rows]
    return [table_row(*titles), ruler(len(titles), "---:"), *body]


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean over seeds, and the largest distance from it; one seed has no spread."""
    mean = fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {max(abs(value - mean) for value in values):.1f}"
