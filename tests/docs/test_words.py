"""The documentation is written in the field's words: the project's old jargon does not come
back.
"""

import re

import pytest

from tests.helpers.pages import PAGES, ROOT, prose

BANNED = {
    r"\bsquares?\b(?! (\*\*)?(MoRA )?(matrix|matrices|root))": "MoRA matrix, MoRA matrices, or M",
    r"(?<!learning )\brates?\b": "learning rate",
    r"\b(ramps?|ramp-up)\b": "re-warmup",
    r"\bpieces?\b": "tokens",
    r"\bknown by heart\b|\bby heart\b": "memorised",
    r"\bembedded default\b": "the demo",
    r"\badapter bank\b": "multi-adapter inference",
    r"\bbeside\b": "in addition to, next to, with",
    r"\bone's own\b|\bso many\b|\bwhence\b|\bgoing home\b": "plain words",
    r"\b(rooms?|houses?|wings?|floors?)\b(?!\()": "packages, modules",
    r"\bat the highest\b": "peak",
    r"\bheld all the time\b": "static memory",
    r"\btold\b": "printed, named, reported",
    r"\bwhole (base|model|weights?|matrix|matrices|checkpoint|copy|copies)\b|\bbase whole\b": "unsharded, complete",
}


def written_by_hand(text):
    """Without code in the line, links' targets, comments, quoted messages and
    mathematics.
    """
    text = re.sub(r"``?[^`\n]+``?|<!--.*?-->|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    text = re.sub(r"^(>| {4}).*$", "", text, flags=re.MULTILINE)
    return " ".join(text.split()).replace("root mean square", "")


def banned_words(text):
    """What is wrong with a text: each banned word, and what to say."""
    return [
        f"{match[0]!r} in {text[max(0, match.start() - 40) : match.end() + 20]!r}: say {better}"
        for pattern, better in BANNED.items()
        for match in re.finditer(pattern, text, flags=re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_none_of_the_banned_words(page):
    assert not banned_words(written_by_hand(prose(page)))


def test_a_banned_word_is_found():
    (problem,) = banned_words(written_by_hand("A Square of `told` is\na square root."))
    assert "'Square'" in problem
