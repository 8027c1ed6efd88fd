"""Continual pretraining with MoRA under DeepSpeed.

deepspeed launch/pretrain.py [RECIPE.yaml] --deepspeed configs/zero3.json [--flags, see --help]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout, not installed

from mora_ds.runtime import cli
from mora_ds.runtime.log_setup import set_up_logging


def main() -> None:
    from mora_ds.config.arguments import parse  # not above: it takes seconds, and signals must be watched before
    from mora_ds.train.agreement import start_up

    with start_up():
        arguments = parse(sys.argv[1:])
    set_up_logging(arguments.training.log_level)
    if arguments.is_demo:
        from mora_ds.train.demo import run_demo

        run_demo(arguments)
    else:
        from mora_ds.train.warm_start import run_job

        run_job(arguments)


if __name__ == "__main__":
    cli.run(main, restartable=True)
