"""Hook of mkdocs: what the pages link to outside docs/, and what they include from
there.

On the repository's own pages a link such as ../../configs/recipes/README.md works; on
the site that file is not there.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs calls it for every page: links that leave docs/ become plain text on the
    site, where those files are not, and `<!-- include: FILE -->` becomes the file's
    text."""
    folder = (ROOT / "docs" / page.file.src_path).parent

    def plain(link: re.Match[str]) -> str:
        target = (folder / link[2].partition("#")[0]).resolve()
        return link[0] if target.is_relative_to(ROOT / "docs") else link[1]

    def included(comment: re.Match[str]) -> str:
        text = (ROOT / comment[1]).read_text(encoding="utf-8")
        return re.sub(r"\A# .*\n", "", text)

    return re.sub(r"<!-- include: (\S+) -->", included, _LINK.sub(plain, markdown))
