"""Notebooks of the tutorials, made from their Markdown: each page is written once, its notebook follows from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TUTORIALS = ("first-run", "own-model", "from-lora")
"""The pages of docs/tutorials/ that run on one machine."""

_BLOCK = re.compile(r"<!-- run: (?:demo|ci) -->\n```(bash|python)\n(.*?)```\n", re.DOTALL)


def notebook(page: str) -> str:
    """The notebook of a page, as JSON: its blocks marked as run become cells of code, all else becomes text.

    A notebook starts in its own folder, docs/tutorials; its first cell goes to the root of the checkout, where the
    commands run.
    """
    cells = [_code("%cd ../..")]
    position = 0
    for block in _BLOCK.finditer(page):
        cells.append(_text(page[position : block.start()]))
        language, source = block.groups()
        cells.append(_code(f"%%bash\n{source}" if language == "bash" else source))
        position = block.end()
    cells.append(_text(page[position:]))
    cells = [{**cell, "id": f"cell-{number}"} for number, cell in enumerate(cell for cell in cells if cell["source"])]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def notebooks(folder: Path) -> dict[Path, str]:
    """{path: content} of every tutorial's notebook in `folder`."""
    return {folder / f"{name}.ipynb": notebook((folder / f"{name}.md").read_text("utf-8")) for name in TUTORIALS}


def _code(source: str) -> dict[str, Any]:
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": _lines(source)}


def _text(markdown: str) -> dict[str, Any]:
    """A cell of text, without the comments that mark blocks of commands."""
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(re.sub(r"<!--.*?-->\n", "", markdown))}


def _lines(text: str) -> list[str]:
    return text.strip().splitlines(keepends=True)
