"""The code blocks of README.md."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def code_with(word: str) -> str:
    """The one block of Python that has it."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    (code,) = (block for block in blocks if word in block)
    return code
