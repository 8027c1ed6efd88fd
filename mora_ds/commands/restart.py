"""Run a job again when it fails or was stopped, from its newest checkpoint.

mora-ds restart TIMES [--wait_s 10] -- mora-ds pretrain [flags]
"""

import argparse
import sys

from mora_ds.runtime.restart import restart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("times", type=int, help="restarts at most")
    parser.add_argument(
        "--wait_s", type=float, default=10.0, help="seconds before the first restart, doubled each time"
    )
    parser.add_argument(
        "command", nargs="+", help="after --: mora-ds pretrain ..., or deepspeed or torchrun with launch/pretrain.py"
    )
    arguments = parser.parse_args()
    sys.exit(restart(arguments.times, arguments.wait_s, arguments.command))
