"""The pages of the documentation, for its tests."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ELSEWHERE = "README.md CONTRIBUTING.md tools/README.md configs/recipes/README.md"
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ELSEWHERE.split()),
]

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def code_with(word, page="README.md", language="python"):
    """The one block of code on a page that contains `word`."""
    text = (ROOT / page).read_text()
    blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)
    (code,) = (block for block in blocks if word in block)
    return code


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())
