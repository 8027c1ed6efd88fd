"""ReLoRA's full-rank warm start: the first steps of a run train every parameter, the rest train the adapter.

    --full_rank_steps N    OUTPUT_DIR/full_rank/          steps 1 .. N, plain ZeRO, exported to full_rank/merged
                           OUTPUT_DIR/                    steps N + 1 .. --max_steps on that base: an ordinary run

Both parts read one order of batches. The first part has a constant learning rate after --warmup_steps (at most half of
the part); the second has the schedule that the flags describe, over the steps that are left. --stop_when_forgotten ends
the run in either part, each of which is compared with its own start.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from mora_ds.checkpoint.folder import AUTO
from mora_ds.checkpoint.layout import MERGED_FOLDER, RUN_FILE, SUMMARY_FILE
from mora_ds.common.errors import UserError
from mora_ds.common.files import load_yaml, read_json
from mora_ds.common.untrusted import expanded
from mora_ds.config.adapter import AdapterArguments, AdapterKind
from mora_ds.config.arguments import Arguments
from mora_ds.config.forgetting import Watch
from mora_ds.config.validate import validate
from mora_ds.engine.base_device import BaseDevice
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.train.agreement import start_up
from mora_ds.train.inputs import check_inputs
from mora_ds.train.output_folder import check
from mora_ds.train.pretrain import pretrain
from mora_ds.train.run_file import holds_run
from mora_ds.train.setup import compare_settings, start_processes

logger = logging.getLogger(__name__)

FOLDER = "full_rank"
DEFAULT_RATIO = 0.1
"""Learning rate of the full-rank steps / --learning_rate: the MoRA paper's 7B learning rates are 3e-5 for full
training, 3e-4 to 5e-4 for adapters of rank 8."""


def run_job(arguments: Arguments) -> dict[str, Any]:
    """`pretrain`, after the full-rank steps where there are any. Returns the content of `summary.json`."""
    steps = arguments.adapter.full_rank_steps
    if steps < 1:
        return pretrain(arguments)
    with start_up():
        validate(arguments)
        first_part = _first_part(arguments)
        if arguments.training.dry_run:
            compare_settings(arguments)
            pretrain(first_part)
            return pretrain(arguments)
        ranks, folder = start_processes(arguments), Path(first_part.training.output_dir)
        done, goes_on = ranks.on_first("full-rank part", lambda: _progress(arguments, steps, folder))
    if not done:
        logger.info(f"steps 1 to {steps}: every parameter is trained, under plain ZeRO; the adapter follows")
        done = pretrain(first_part)
    watch = Watch.of(arguments.training.stop_when_forgotten, ())
    reason = watch.forgotten(done["perplexity_before"], done["perplexity_after"])
    if not goes_on and (reason or done["steps"] < steps):  # without a reason: a task has stopped it
        logger.info(f"the run ends after its full-rank part, before an adapter{': ' if reason else ''}{reason or ''}")
        logger.info(f"its model is {folder / MERGED_FOLDER}")
        return done
    return pretrain(arguments, base=folder / MERGED_FOLDER)


def _first_part(arguments: Arguments) -> Arguments:
    adapter, training = arguments.adapter, arguments.training
    return replace(
        arguments,
        adapter=AdapterArguments(adapter=AdapterKind.FULL.value),
        training=replace(
            training,
            output_dir=str(expanded(training.output_dir) / FOLDER),
            max_steps=adapter.full_rank_steps,
            learning_rate=adapter.full_rank_learning_rate or DEFAULT_RATIO * training.peak_learning_rate,
            warmup_steps=min(training.warmup_steps, adapter.full_rank_steps // 2),
            warmup_ratio=0.0,
            lr_scheduler_type="constant",
            embedding_learning_rate=None,
            base_device=BaseDevice.DEVICE.value,
            optimizer=OptimizerKind.ADAMW.value,
            export_merged=True,
            push_to_hub=None,
            resume_from_checkpoint=AUTO if training.resume_from_checkpoint else None,
        ),
    )


def _progress(arguments: Arguments, steps: int, folder: Path) -> tuple[dict[str, Any], bool]:
    """Of a run that is resumed: the summary of its full-rank part in `folder`, empty unless all steps are done, and
    whether the second part has begun.

    The output folder is checked first: what would refuse the second part must not wait for the end of the first.
    """
    training = arguments.training
    resumes = training.resume_from_checkpoint is not None
    check_inputs(arguments, folder.parent)
    check(folder.parent, training.overwrite_output_dir, resumes, training.export_merged)
    if not (resumes and (folder / MERGED_FOLDER).is_dir() and (folder / SUMMARY_FILE).is_file()):
        return {}, False
    planned, done = load_yaml(str(folder / RUN_FILE), RUN_FILE).get("max_steps"), read_json(folder / SUMMARY_FILE)
    if planned != steps:
        raise UserError(f"--full_rank_steps {steps}: {folder} was trained for {planned} steps")
    return done if done.get("steps") == steps else {}, holds_run(folder.parent)
