"""Run a job again when it fails or was stopped, from its newest checkpoint.

python launch/restart.py TIMES [--wait_s 10] -- deepspeed launch/pretrain.py [flags]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout, not installed

from mora_ds.runtime import cli
from mora_ds.runtime.restart import restart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=int, help="restarts at most")
    parser.add_argument(
        "--wait_s", type=float, default=10.0, help="seconds before the first restart, doubled each time"
    )
    parser.add_argument("command", nargs="+", help="after --: what starts launch/pretrain.py")
    arguments = parser.parse_args()
    sys.exit(restart(arguments.times, arguments.wait_s, arguments.command))


if __name__ == "__main__":
    cli.run(main)
