"""Plan memory and traffic of a run on any cluster from the config of its model.

    mora-ds plan --model MODEL_FOLDER_OR_NAME_OR_CONFIG.json --gpus 64 --gpu_memory 80 --seq_len 4096 --mora_rank 8
    mora-ds plan RECIPE.yaml --model MODEL --gpus 64

No weights are read. The recipe and all flags that are not named here are those of
`mora-ds pretrain`. With a micro-batch size, from --micro_batch or the recipe, it plans
these settings as they are. Without --micro_batch it also recommends one, with gradient
checkpointing where nothing fits without. Where the base does not fit it plans
--base_device host. Without --bf16 and --fp16 the run computes in bf16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mora_ds.common.errors import (
    ABOVE_0_AT_MOST_1,
    POSITIVE,
    UserError,
    raise_validation_errors,
    wrong_values,
)
from mora_ds.common.files import packaged
from mora_ds.config.arguments import Arguments, parse
from mora_ds.config.validate import validate
from mora_ds.engine.settings import BaseDevice
from mora_ds.runtime.cli import command_parser, say, say_loading

if TYPE_CHECKING:
    from mora_ds.planning.plan import Plan, Planner

AS_GIVEN = "as given:"
RECOMMENDED = "recommended, the largest micro-batch that fits; the tokens per step follow from it:"
SMALLEST = "nothing fits; the smallest there is:"


def main() -> None:
    options, settings = _parser().parse_known_args()
    counts = ("gpus", "gpus_per_node", "gpu_memory", "micro_batch")
    bounds = {**dict.fromkeys(counts, POSITIVE), "assume_mfu": ABOVE_0_AT_MOST_1}
    raise_validation_errors(wrong_values(options, bounds))
    arguments = _arguments(options, settings)
    say_loading()
    validate(arguments)
    from mora_ds.planning.report import as_json, cost_lines, report

    plans = _plans(options, arguments)
    if options.json:
        title, plan = next(iter(plans.items()))
        recommended = title == RECOMMENDED
        say(json.dumps({**as_json(plan), "recommended": recommended}, indent=2))
        return
    for title, plan in plans.items():
        costs = cost_lines(plan, arguments.training.max_steps, options.assume_mfu)
        say(title, report(plan), *costs)


def _plans(options: argparse.Namespace, arguments: Arguments) -> dict[str, Plan]:
    """Title -> plan: the settings as they are, where they have a micro-batch size, and
    what is recommended in their place."""
    from mora_ds.planning.plan import place_base, recommend

    base_device = BaseDevice(arguments.training.base_device)
    planner = _planner(options, arguments)
    plans = {}
    if "per_device_train_batch_size" in arguments.set_by_user:
        plans[AS_GIVEN] = place_base(planner, base_device).plan()
    if options.micro_batch is None:
        work = replace(planner.work, micro_batch=1, checkpointing=True)
        planner = place_base(replace(planner, work=work), base_device)
        if plan := recommend(planner):
            plans[RECOMMENDED] = plan
        elif not plans:
            plans[SMALLEST] = planner.plan()
    return plans


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.epilog = "It also takes a recipe, as the first argument, and the flags of mora-ds pretrain."
    parser.add_argument(
        "--model", required=True, help="a folder, a Hub name, or a config.json"
    )
    parser.add_argument(
        "--gpus", type=int, required=True, help="number of processes, one per GPU"
    )
    parser.add_argument(
        "--gpu_memory",
        type=float,
        default=80.0,
        help="memory of a GPU in GB (10^9 bytes)",
    )
    parser.add_argument(
        "--gpus_per_node", type=int, default=8, help="processes of a node"
    )
    parser.add_argument(
        "--micro_batch",
        type=int,
        help="sequences per micro-batch and process; default: recommended",
    )
    parser.add_argument(
        "--assume_mfu",
        type=float,
        help="fraction of an H100's peak that the run is assumed to use, such as 0.4: prints GPU-hours",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the first plan as JSON, in bytes",
    )
    return parser


def _arguments(options: argparse.Namespace, settings: Sequence[str]) -> Arguments:
    """The settings of the run that is planned, from recipe and flags of
    `mora-ds pretrain`. Raises `UserError`."""
    for word in settings:
        flag = word.split("=")[0]
        if flag.replace("-", "_") == "__model_config":
            raise UserError(f"{flag} is for training: a plan takes --model")
    flags = ["--model_name_or_path", packaged(options.model), "--dry_run"]
    if options.micro_batch is not None:
        flags += ["--per_device_train_batch_size", str(options.micro_batch)]
    arguments = parse([*settings, *flags])
    # The recipe may name a config, whose place --model takes.
    model = replace(arguments.model, model_config=None)
    training = arguments.training
    if not arguments.set_by_user & {"bf16", "fp16"}:
        training = replace(training, bf16=True)
    return replace(arguments, model=model, training=training)


def _planner(options: argparse.Namespace, arguments: Arguments) -> Planner:
    """Plans of that run on the cluster that is named, in place of this machine."""
    from mora_ds.engine.ds_config import resolve_ds_config
    from mora_ds.models.load import named_config, set_rope
    from mora_ds.planning.plan import Cluster
    from mora_ds.train.dry_run import planner_of
    from mora_ds.train.setup import deepspeed_file

    model = arguments.model
    training = arguments.training
    config = named_config(
        str(model.model_name_or_path), model.trust_remote_code, "--model"
    )
    set_rope(config, model.rope, model.trust_remote_code)
    replicas = max(1, options.gpus // training.ranks_per_replica)
    settings = training.engine_settings()
    ds_config = resolve_ds_config(deepspeed_file(training), settings, replicas)
    planner = planner_of(arguments, config, ds_config, options.gpus)
    cluster = Cluster(options.gpus, options.gpus_per_node, options.gpu_memory * 1e9)
    return replace(planner, cluster=cluster, on_cpu=False)
