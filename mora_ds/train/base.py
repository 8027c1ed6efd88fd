"""The base model of a run: folder, config, unsharded weights on every rank, and their
place (device or host memory)."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mora_ds.checkpoint.layout import BASE_FOLDER
from mora_ds.common.errors import reason
from mora_ds.common.untrusted import expanded
from mora_ds.config.arguments import Arguments
from mora_ds.config.data import ModelArguments
from mora_ds.config.training import TrainingArguments
from mora_ds.data import largest_id
from mora_ds.engine.device import is_cpu
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.settings import BaseDevice
from mora_ds.models.dequantize import dequantized_base, is_quantized
from mora_ds.models.load import (
    LoadedBase,
    config_digest,
    create_base,
    folder_config,
    load_base,
    read_model_config,
    resolve_folder,
    set_rope,
)
from mora_ds.models.rope import rope_changes
from mora_ds.planning.plan import Planner, place_base
from mora_ds.planning.report import size_text
from mora_ds.runtime.node_memory import require_memory
from mora_ds.runtime.nodes import write_on_rank0
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.dry_run import planner_of
from mora_ds.train.setup import RunContext

logger = logging.getLogger(__name__)


def find_model(model: ModelArguments, context: RunContext) -> tuple[Path | None, Any]:
    """Return (folder of the base, its config with --rope_scaling applied). The folder
    is None for --model_config, which asks for random weights. Collective."""
    folder = None
    if model.model_name_or_path is None:
        assert model.model_config is not None, "validated"
        config = read_model_config(expanded(model.model_config, "--model_config"))
    else:
        folder = resolve_folder(model.model_name_or_path, context.ranks)
        config = folder_config(folder, model.trust_remote_code)
    if is_quantized(config):
        # The run uses dequantized weights.
        del config.quantization_config
    set_rope(config, model.rope, model.trust_remote_code)
    context.ranks.same("the model", {"config.json (digest)": config_digest(config)})
    return folder, config


def prepare_base(
    model: ModelArguments,
    training: TrainingArguments,
    folder: Path | None,
    tokenizer: Any,
    dtype: torch.dtype,
    context: RunContext,
) -> LoadedBase:
    """Load the unsharded base on every rank, from `folder` or, if that is None, newly
    created from --model_config. A quantized base is dequantized once. Collective."""
    base_folder = context.folder / BASE_FOLDER
    if folder is None:
        config_file = expanded(str(model.model_config), "--model_config")
        vocabulary = largest_id(tokenizer)[1] + 1

        def create() -> None:
            if context.checkpoint is None or not (base_folder / "config.json").exists():
                create_base(
                    config_file, base_folder, training.seed, tokenizer, vocabulary
                )

        write_on_rank0(context.ranks, "creation of the base", base_folder, create)
        folder = base_folder
    elif is_quantized(folder_config(folder, model.trust_remote_code)):
        folder = dequantized_base(folder, base_folder, dtype, context.ranks)
    changes = rope_changes(folder_config(folder, model.trust_remote_code), model.rope)
    loaded = load_base(
        folder,
        base_folder,
        context.ranks,
        dtype,
        model.implementation,
        model.trust_remote_code,
        changes,
    )
    if training.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return loaded


def choose_base_device(
    arguments: Arguments, config: Any, ds_config: DsConfig, ranks: Ranks
) -> Arguments:
    """Return the arguments with --base_device auto replaced by "device" or "host".

    Collective. Raises `UserError` for "host" if the model's decoder layers are not
    found, or if a node has too little memory for them.
    """
    training = arguments.training

    def planner() -> Planner:
        return planner_of(arguments, config, ds_config, ranks.world)

    device = BaseDevice(training.base_device)
    if device is BaseDevice.AUTO and (arguments.adapter.is_control or is_cpu()):
        device = BaseDevice.DEVICE
    if device is BaseDevice.AUTO:
        planned = ranks.run_on_rank0(
            "device of the base", lambda: _planned_device(planner).value, long=True
        )
        device = BaseDevice(planned)
    if device is BaseDevice.HOST:
        needed = ranks.run_on_rank0(
            "decoder layers", lambda: planner().streamed().total, long=True
        )
        advice = ": give the run more (also raise the limit of its container or job), or use --base_bits 8"
        ranks.agree(
            "host memory for the base",
            lambda: require_memory(
                needed, "--base_device host: the frozen base", advice
            ),
        )
        size = size_text(needed)
        logger.info(
            f"frozen base: {size} in host memory, copied to the device layer by layer"
        )
    return replace(arguments, training=replace(training, base_device=device.value))


def _planned_device(make: Callable[[], Planner]) -> BaseDevice:
    """Resolve --base_device auto: host if the run does not fit on the device."""
    try:
        planner = make()
        placed = place_base(planner, BaseDevice.AUTO)
        if placed is planner:
            return BaseDevice.DEVICE
        placed.streamed()
    # A plan is only advice: a model that cannot be planned may still run.
    except Exception as error:
        why = reason(error)
        logger.warning(
            f"--base_device auto: device, as this run cannot be planned: {why}"
        )
        return BaseDevice.DEVICE
    logger.info("--base_device auto: host, as the run does not fit otherwise")
    return BaseDevice.HOST
