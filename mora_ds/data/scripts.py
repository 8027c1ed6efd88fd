"""In which scripts a text is written: letters counted by the script that their Unicode name begins with."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache


def count_scripts(text: str) -> Counter[str]:
    """Script (LATIN, GREEK, CJK, HIRAGANA, ...) -> letters of it in `text`; digits, signs and spaces are none."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := _script(character):
            found[script] += count
    return found


@lru_cache(maxsize=1 << 17)
def _script(character: str) -> str:
    return unicodedata.name(character, "OTHER").split()[0].split("-")[0] if character.isalpha() else ""
