"""`mora-ds COMMAND [flags]`: one program for training and all that stands around it.

A command's module is imported when the command is called. It imports torch and the like
only after it has read its flags, so that `--help` and a wrong flag wait for neither.
"""

import sys
from collections.abc import Callable
from importlib import import_module

from mora_ds.common.errors import UserError, unknown
from mora_ds.common.version import __version__
from mora_ds.runtime import cli

COMMANDS = {
    "pretrain": "train, or run the demo; --num_gpus N starts N processes",
    "recipes": "list or copy the recipes and DeepSpeed files of this package",
    "plan": "plan memory and traffic of a run from its model's config",
    "analyze": "analyze a model's weights, and plan which layers to adapt",
    "prepare-corpus": "tokenize the text of a training run ahead",
    "extend-vocab": "add a domain's tokens to a model's vocabulary",
    "export": "write the merged Hugging Face model of a checkpoint",
    "convert": "convert a checkpoint: adapter alone, LoRA of PEFT",
    "evaluate": "measure perplexity and bits per byte of a model or a checkpoint",
    "evaluate-adapters": "measure many adapters of one base",
    "ledger": "show or sum merge ledgers",
    "spectrum": "measure ranks of merged updates",
    "verify": "verify every file of a checkpoint or a run",
}
"""Command -> what it does. Its module has its name."""

PRETRAIN = "pretrain"


def load(name: str) -> Callable[[], None]:
    """The function of a command, whose module is imported now."""
    module = import_module(f"mora_ds.commands.{name.replace('-', '_')}")
    return module.start if name == PRETRAIN else module.main


def main() -> None:
    """Run the command that `sys.argv` names, and end the process. Never returns."""
    name = take_command(sys.argv)
    cli.run(lambda: run(name), restartable=name == PRETRAIN)


def take_command(argv: list[str]) -> str:
    """Take the command's name out of `argv`, where a launcher may have put its
    `--local_rank` before it; "" for none. `argv[0]` becomes what `--help` calls the
    program."""
    index = 1
    if argv[1:] and argv[1].startswith(("--local_rank=", "--local-rank=")):
        index = 2
    name = argv.pop(index) if len(argv) > index else ""
    argv[0] = f"mora-ds {name}"
    return name


def run(name: str) -> None:
    """Run a command on the flags in `sys.argv`. Raises `UserError` for an unknown
    one."""
    if name in ("", "-h", "--help"):
        cli.say(*help_lines())
    elif name == "--version":
        cli.say(f"mora_ds {__version__}")
    elif name not in COMMANDS:
        raise UserError(unknown("command", name, COMMANDS))
    else:
        load(name)()


def help_lines() -> list[str]:
    """What `mora-ds --help` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    head = [
        "usage: mora-ds COMMAND [flags]",
        "",
        "Continual pretraining with MoRA and ReMoRA under DeepSpeed.",
        "",
    ]
    return [*head, *rows, "", "mora-ds COMMAND --help lists a command's flags."]
