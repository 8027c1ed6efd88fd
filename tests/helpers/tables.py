"""Tables of cases in text: a row a line, its cells separated by " | "; lines that begin with "#" are comments."""

from typing import Any

import yaml


def rows(text: str) -> list[tuple[str, ...]]:
    """The cells of every row."""
    lines = [line.strip() for line in text.splitlines()]
    return [tuple(line.split(" | ")) for line in lines if line and not line.startswith("#")]


def parsed(cell: str) -> Any:
    """What a cell means that is written as YAML, such as "{optimizer: {type: Lamb}}"."""
    return yaml.safe_load(cell)
