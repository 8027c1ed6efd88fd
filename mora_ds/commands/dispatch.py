"""`mora-ds COMMAND [flags]`: one program for training and for all that is done with a model, a text or a checkpoint.

A command's module is imported when the command is called, so that the list of commands is there at once.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from mora_ds.common import research
from mora_ds.common.errors import UserError, unknown
from mora_ds.common.version import __version__
from mora_ds.runtime import cli


@dataclass(frozen=True)
class Command:
    """One command: what it does in a line, and its function."""

    what: str
    function: str
    """module.function, in `mora_ds.commands`; those of `mora_ds.research` begin with `research.`."""
    restartable: bool = False
    """Whether a signal makes it save and stop, to be run again (`runtime/cli.py`)."""

    def load(self) -> Callable[[], None]:
        """The function, whose module is imported now."""
        module, _, function = self.function.rpartition(".")
        package, _, name = module.rpartition(".")
        home = research.load(name) if package == "research" else import_module(f"mora_ds.commands.{name}")
        command: Callable[[], None] = getattr(home, function)
        return command


COMMANDS = {
    "pretrain": Command(
        "train, or run the demo; --num_gpus N starts N processes",
        "pretrain.start",
        restartable=True,
    ),
    "recipes": Command("list or copy the recipes and DeepSpeed files of this package", "recipes.main"),
    "plan": Command("plan memory and traffic of a run from its model's config", "plan.main"),
    "analyze": Command("analyse a model's weights, and plan which layers to adapt", "research.analyze.main"),
    "prepare-corpus": Command("tokenise the text of a training run ahead", "prepare_corpus.main"),
    "extend-vocab": Command("add a domain's tokens to a model's vocabulary", "extend_vocab.main"),
    "export": Command("write the merged Hugging Face model of a checkpoint", "export.main"),
    "convert": Command("convert a checkpoint: adapter alone, LoRA of PEFT", "convert.main"),
    "evaluate": Command("measure perplexity and bits per byte of a model or a checkpoint", "evaluate.main"),
    "evaluate-adapters": Command("measure many adapters of one base", "research.bank.main"),
    "ledger": Command("show or sum merge ledgers", "ledger.main"),
    "spectrum": Command("measure singular values and ranks of merged updates", "research.spectrum.main"),
    "verify": Command("verify every file of a checkpoint or a run", "verify.main"),
}


def main() -> None:
    """Run the command that `sys.argv` names, and end the process. Never returns."""
    name = take_command(sys.argv)
    cli.run(lambda: run(name), restartable=name in COMMANDS and COMMANDS[name].restartable)


def take_command(argv: list[str]) -> str:
    """Takes the command's name out of `argv`, where a launcher may have put its `--local_rank` before it; "" for none.

    `argv[0]` becomes what `--help` calls the program.
    """
    index = 2 if argv[1:] and argv[1].startswith("--local_rank=") else 1
    name = argv.pop(index) if len(argv) > index else ""
    argv[0] = f"mora-ds {name}"
    return name


def run(name: str) -> None:
    """Run a command on the flags in `sys.argv`. Raises `UserError` for an unknown one, and what the command raises."""
    if name in ("", "-h", "--help"):
        print("\n".join(help_lines()))
    elif name == "--version":
        print(f"mora_ds {__version__}")
    elif name not in COMMANDS:
        raise UserError(unknown("command", name, COMMANDS))
    else:
        COMMANDS[name].load()()


def help_lines() -> list[str]:
    """What `mora-ds --help` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.what}" for name, command in COMMANDS.items()]
    head = ["usage: mora-ds COMMAND [flags]", "", "Continual pretraining with MoRA and ReMoRA under DeepSpeed.", ""]
    return [*head, *rows, "", "mora-ds COMMAND --help lists a command's flags."]
