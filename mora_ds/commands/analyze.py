"""Measure the ranks of a model's weights, and plan under a budget which layers to adapt.

    mora-ds analyze MODEL
    mora-ds analyze MODEL --trainable_budget 0.5% --write targets.yaml

Exit code 2: an error that you can correct in the command.
"""

import argparse
from pathlib import Path

from mora_ds.adapters.target_patterns import ALL_LINEAR
from mora_ds.common.errors import UserError, named_as_flags
from mora_ds.runtime.cli import check_writable, command_parser, say, shared_flags


@named_as_flags("target_modules")
def main() -> None:
    options = _parser().parse_args()
    check_writable("--write", options.write)
    if (options.write is None) != (options.trainable_budget is None):
        raise UserError(
            "--trainable_budget and --write need each other: a plan for the budget is written to the file"
        )
    from mora_ds.models.base import BaseCheckpoint
    from mora_ds.research.analyze import (
        allocate_budget,
        layers_of,
        measure,
        parse_budget,
        report_lines,
    )
    from mora_ds.research.targets import TargetPlan

    base = BaseCheckpoint.open(options.model, "MODEL")
    keys, parameters = layers_of(
        base, options.target_modules, options.trust_remote_code
    )
    budget = None
    if options.write is not None:
        budget = parse_budget(options.trainable_budget, parameters)
    weights = [measure(name, base.read(key)) for name, key in keys.items()]
    say(*report_lines(weights))
    if budget is not None:
        plan = TargetPlan(base.fingerprint(), allocate_budget(weights, budget))
        plan.write(options.write)
        trained = sum(side**2 for side in plan.layers.values())
        contents = f"{trained:,} parameters; research.targets of a recipe takes it"
        say(f"wrote {options.write}: {contents}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    shared_flags(parser, "model", help="a Hugging Face folder with safetensors")
    parser.add_argument(
        "--target_modules",
        nargs="+",
        default=[ALL_LINEAR],
        help="which layers, as in training",
    )
    parser.add_argument(
        "--trainable_budget",
        help="trainable parameters: a share of the model's, such as 0.5%%, or a number",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="the plan for research.targets of a recipe",
    )
    shared_flags(parser, "--trust_remote_code")
    return parser
