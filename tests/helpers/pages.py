"""The pages of the documentation, for its tests."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "tools/README.md",
            "configs/recipes/README.md",
        )
    ),
]

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())
