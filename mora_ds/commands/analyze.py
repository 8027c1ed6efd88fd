"""Measure a model's layers, and plan under a budget which of them to adapt.

    mora-ds analyze MODEL
    mora-ds analyze MODEL --trainable_budget 0.5% --write targets.yaml
    mora-ds analyze MODEL --probe 'domain/*.jsonl' --trainable_budget 0.5% --write targets.yaml

By default the measure is the rank of each weight; with --probe it is the gradient of each
layer's MoRA matrix on a few batches of text.

Exit code 2: an error that you can correct in the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from mora_ds.adapters.target_patterns import ALL_LINEAR
from mora_ds.common.errors import (
    COUNT,
    UserError,
    named_as_flags,
    raise_validation_errors,
    wrong_values,
)
from mora_ds.runtime.cli import (
    check_device,
    check_writable,
    command_parser,
    path_on_disk,
    say,
    shared_flags,
)

if TYPE_CHECKING:
    from mora_ds.research.analyze import GradientMeasures


@named_as_flags("target_modules")
def main() -> None:
    options = _parser().parse_args()
    check_writable("--write", options.write)
    if (options.write is None) != (options.trainable_budget is None):
        raise UserError(
            "--trainable_budget and --write need each other: a plan for the budget is written to the file"
        )
    raise_validation_errors(wrong_values(options, {"probe_batches": COUNT}))
    check_device(options.device)
    from mora_ds.models.base import BaseCheckpoint
    from mora_ds.research.analyze import (
        LayerMeasures,
        allocate_budget,
        layers_of,
        measure,
        parse_budget,
        probe_lines,
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
    layers: Sequence[LayerMeasures]
    if options.probe:
        layers = gradients = _probe(options)
        say(*probe_lines(gradients))
    else:
        layers = weights = [measure(name, base.read(key)) for name, key in keys.items()]
        say(*report_lines(weights))
    if budget is not None:
        plan = TargetPlan(base.fingerprint(), allocate_budget(layers, budget))
        plan.write(options.write)
        trained = sum(side**2 for side in plan.layers.values())
        contents = f"{trained:,} parameters; research.targets of a recipe takes it"
        say(f"wrote {options.write}: {contents}")


def _probe(options: argparse.Namespace) -> list[GradientMeasures]:
    """The gradients of MoRA matrices of zeros, on the first windows of --probe."""
    import torch

    from mora_ds.adapters.config import MoRAConfig
    from mora_ds.data import load_corpus
    from mora_ds.eval.perplexity import Score, Windows, cut_windows, load_target
    from mora_ds.research.analyze import probe

    config = MoRAConfig(target_modules=tuple(options.target_modules))
    corpus = load_corpus(options.probe, text_column=options.text_column, flag="--probe")
    target = load_target(
        options.model,
        dtype="float32",
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    windows = Windows.of(target.model, options.window, None)
    cut = cut_windows(corpus, target.tokenizer, windows, None, Score())
    batches = [torch.tensor([ids]) for ids, _ in islice(cut, options.probe_batches)]
    return probe(target.model, config, batches)


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
        type=path_on_disk,
        metavar="FILE",
        help="the plan for research.targets of a recipe",
    )
    parser.add_argument(
        "--probe",
        nargs="+",
        metavar="FILES",
        help="text: plan by the gradients of MoRA matrices on it, not by the weights",
    )
    parser.add_argument(
        "--probe_batches",
        type=int,
        default=8,
        help="how many windows of that text are read",
    )
    parser.add_argument("--window", type=int, help="tokens per window")
    shared_flags(parser, "--device", "--text_column", "--trust_remote_code")
    return parser
