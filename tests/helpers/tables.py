"""Tables of cases in text: a row a line, its cells separated by " | "; lines that begin
with "#" are comments.
"""

import pytest
import yaml


def rows(text):
    """The cells of every row."""
    lines = [line.strip() for line in text.splitlines()]
    return [tuple(line.split(" | ")) for line in lines if line and not line.startswith("#")]


def parsed(cell):
    """What a cell means that is written as YAML, such as "{optimizer: {type: Lamb}}"."""
    return yaml.safe_load(cell)


def heavy(*values):
    """Values of a parametrised test that the heavy tests alone take."""
    return pytest.param(*values, marks=pytest.mark.heavy)
