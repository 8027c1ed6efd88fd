"""List or copy the recipes, DeepSpeed files and model configs that come with mora_ds.

    mora-ds recipes                              every file; a recipe begins with what it is for
    mora-ds recipes copy my-configs              all of them, to be changed

Without copying, a path that begins with configs/ means the package's own file wherever the working directory has none:
mora-ds pretrain configs/recipes/continual.yaml --deepspeed configs/zero3.json.
"""

import argparse
from pathlib import Path

from mora_ds.common.errors import named_as_flags
from mora_ds.common.files import CONFIGS, config_names, copy_folder, require_new
from mora_ds.runtime.cli import add_action, command_parser, say


@named_as_flags(output="the folder")
def main() -> None:
    options = _parser().parse_args()
    if options.action == "copy":
        require_new(options.folder)
        copy_folder(CONFIGS, options.folder)
        say(f"wrote {options.folder}: {len(config_names())} files")
    else:
        say(*(f"configs/{name}" for name in config_names()))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    actions = parser.add_subparsers(dest="action", metavar="copy")
    copy = add_action(actions, "copy", "write all files into a new folder")
    copy.add_argument("folder", type=Path, help="folder to write; must be new")
    return parser
