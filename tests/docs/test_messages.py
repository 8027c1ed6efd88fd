"""Messages that the documentation quotes are the program's own."""

import ast
import re

from tests.helpers.pages import ROOT

GAP = "\0"
"""Stands for what is filled in when the message is printed."""


def texts(node):
    """Every string in a module, with gaps for what an f-string fills in."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        elif isinstance(child, ast.JoinedStr):
            yield "".join(
                str(segment.value) if isinstance(segment, ast.Constant) else GAP
                for segment in child.values
            )


def quoted(page):
    """Lines that a page quotes as messages: `> ...`."""
    return re.findall(r"^> (.+)$", page.read_text(), flags=re.MULTILINE)


def matches(message, text):
    """Whether the parts of a message between its dots stand in a string of the code, in
    order.
    """
    patterns = [
        re.escape(phrase)
        for phrase in (segment.strip(" ") for segment in message.split("..."))
        if phrase
    ]
    return re.search(rf"[\s\S]*?{GAP}?".join(patterns), text) is not None


def test_every_quoted_message_is_in_the_code():
    files = [
        path
        for name in ("mora_ds", "launch", "tools")
        for path in (ROOT / name).rglob("*.py")
    ]
    known = [text for path in files for text in texts(ast.parse(path.read_text()))]
    # As programs print arguments (`named_as_flags`)
    known += [re.sub(r"`(\w+)`", r"--\1", text) for text in known]
    messages = quoted(ROOT / "docs/help/troubleshooting.md")
    assert len(messages) >= 15
    gone = [
        message
        for message in messages
        if not any(matches(message, text) for text in known)
    ]
    assert not gone
