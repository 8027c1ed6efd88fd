"""Code blocks of README.md and of the pages under docs/."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def code_with(word, page="README.md"):
    """The one block of Python on a page that contains `word`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    (code,) = (block for block in blocks if word in block)
    return code
