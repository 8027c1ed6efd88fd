"""Repeat a table of docs/results: run the command that its JSON names.

    python tools/bench/repeat.py TABLE [--folder out/evidence]

`make evidence TABLE=learning_135m_long` does so from nothing: it installs the packages
that models and texts are made of, and makes them (tools/bench/pretrained.py). Writes
FOLDER/TABLE.json, and prints the published table last. Every finished run is kept, so
that the same command goes on where it was stopped.

Those of `learning.py` and `memorization.py` can be repeated; other benches are one
command already. A table that was collected from the runs of several commands (`--with`)
is refused, since its JSON names the last command alone.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.common.errors import RunError, UserError, unknown
from mora_ds.common.files import read_json
from mora_ds.runtime import cli
from mora_ds.runtime.cli import command_parser, table
from tools.plans import DATA, ROOT

REPEATED = ("tools/bench/learning.py", "tools/bench/memorization.py")
FETCHED = "out/fetched"
"""Where commands expect what tools/bench/pretrained.py makes."""


def main() -> None:
    options = _options()
    tables = {path.stem: path for path in DATA.glob("*.json")}
    if options.table not in tables:
        raise UserError(unknown("TABLE", options.table, tables))
    published = read_json(tables[options.table])
    words = words_of(published.get("command", ""))
    written = options.folder.absolute() / f"{options.table}.json"
    words += ["--work", str(written.with_suffix("")), "--json", str(written)]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT)
    if ended.returncode:
        raise RunError(f"{shlex.join(words)} failed: see what it printed above")
    print(f"\n{written} is written. The published table:")
    for rows in published["tables"].values():
        print("\n".join(table(rows)))


def _options() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "table", metavar="TABLE", help="a file of docs/results/data, without .json"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("out/evidence"),
        help="where runs and table are written",
    )
    return parser.parse_args()


def words_of(command: str) -> list[str]:
    """What follows `python` in the command of a table. Raises `UserError` for one that
    cannot be repeated, and for one whose model or texts are not there."""
    words = shlex.split(command)[1:]
    if not words or words[0] not in REPEATED:
        raise UserError(f"TABLE: it is not of a learning bench, but of: {command}")
    if "--with" in words:
        raise UserError("TABLE: it was collected from the runs of several commands")
    for word in words:
        if word.startswith(f"{FETCHED}/") and not (ROOT / word).exists():
            raise UserError(
                f"there is no {word}: run python tools/bench/pretrained.py {FETCHED}"
            )
    return words


if __name__ == "__main__":
    cli.run(main)
