"""A command of `mora-ds`, or a program of `tools/`, in this process: for what it says of
its flags, which needs no interpreter of its own."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from tests.helpers.tables import words

COMMANDS = {
    "convert_checkpoint": "convert",
    "export_hf": "export",
    "verify_checkpoint": "verify",
}
"""Longer names of commands -> their modules in mora_ds.commands; others have the name of
the command.
"""


def tool(name):
    """The module mora_ds.commands.NAME, or else tools.NAME."""
    command = f"mora_ds.commands.{COMMANDS.get(name, name)}"
    if "/" not in name and importlib.util.find_spec(command) is not None:
        return importlib.import_module(command)
    return importlib.import_module(f"tools.{name.replace('/', '.')}")


def call(name, *flags):
    """Its `main` with these flags, for `words`. What it raises is raised here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *words(*flags)])
        tool(name).main()


def called(words, **options):
    """A program that has ended, with what it printed. `options`: of `subprocess.run`."""
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, check=False, **options
    )
