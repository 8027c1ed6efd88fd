"""The same as `mora-ds convert`, from a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mora_ds.commands.convert import main
from mora_ds.runtime import cli

if __name__ == "__main__":
    cli.run(main)
