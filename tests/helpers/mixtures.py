"""Runs on a mixture of two sources."""

from tests.helpers.jobs import rows


def write_mixture(user, path, phases=""):
    path.write_text(
        f"sources:\n  new: {{files: '{user.train}', weight: 0.5}}\n  old: {{files: '{user.held}', weight: 0.5}}\n"
        + phases
    )
    return path


def mixture_flags(user, out, mix, *more):
    """The flags of `user` without its --train_files."""
    flags = user.flags(out, "--mixture", mix, *more)
    at = flags.index("--train_files")
    return flags[:at] + flags[at + 2 :]


def source_rows(out):
    return [row["sources"] for row in rows(out) if "sources" in row]
