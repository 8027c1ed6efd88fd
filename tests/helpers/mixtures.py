"""Runs on a mixture of two sources."""

from pathlib import Path
from typing import Any

from tests.helpers.jobs import Playground, rows


def write_mixture(user: Playground, path: Path, phases: str = "") -> Path:
    path.write_text(
        f"sources:\n  new: {{files: '{user.train}', weight: 0.5}}\n  old: {{files: '{user.held}', weight: 0.5}}\n"
        + phases
    )
    return path


def mixture_flags(user: Playground, out: Path, mix: Path, *more: Any) -> list[str]:
    """The flags of `user` without its --train_files."""
    flags = user.flags(out, "--mixture", mix, *more)
    at = flags.index("--train_files")
    return flags[:at] + flags[at + 2 :]


def source_rows(out: Path) -> list[dict[str, Any]]:
    return [row["sources"] for row in rows(out) if "sources" in row]
