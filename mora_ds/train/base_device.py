"""Where the frozen base of a run is, on the device or in host memory (--base_device): settled before it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mora_ds.common.errors import UserError, reason
from mora_ds.config.arguments import Arguments
from mora_ds.engine.base_device import BaseDevice
from mora_ds.engine.device import is_cpu
from mora_ds.planning.plan import Planner, place_base
from mora_ds.planning.report import size_text, verdict
from mora_ds.runtime.node_memory import free_bytes
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.dry_run import planner_of

logger = logging.getLogger(__name__)


def settle_base_device(arguments: Arguments, config: Any, ds_config: dict[str, Any], ranks: Ranks) -> Arguments:
    """The arguments with "device" or "host" in place of "auto". Collective.

    Raises `UserError` for --base_device host where the model's decoder layers are not found, and where a node has too
    little memory for them.
    """
    training = arguments.training

    def planner() -> Planner:
        return planner_of(arguments, config, ds_config, ranks.world)

    wanted = BaseDevice(training.base_device)
    if wanted is BaseDevice.AUTO and (arguments.adapter.is_control or is_cpu()):
        wanted = BaseDevice.DEVICE
    if wanted is BaseDevice.AUTO:
        wanted = ranks.on_first("where the base is", lambda: _by_plan(planner), long=True)
    if wanted is BaseDevice.HOST:
        needed = ranks.on_first("decoder layers", lambda: planner().streamed().total, long=True)
        ranks.agree("host memory for the base", lambda: check_host_memory(needed, free_bytes()[0]))
        logger.info(f"frozen base: {size_text(needed)} in host memory, copied to the device layer by layer")
    return replace(arguments, training=replace(training, base_device=wanted.value))


def check_host_memory(needed: int, free: int) -> None:
    """Raises `UserError` where a node's `free` memory does not hold the `needed` bytes of frozen weights."""
    if needed > free:
        raise UserError(
            f"--base_device host: the frozen weights take {size_text(needed)} of a node's memory, and "
            f"{size_text(free)} are available: give the run more (the limit of a container or a job, too), or use "
            "--base_bits 8"
        )


def _by_plan(make: Callable[[], Planner]) -> BaseDevice:
    """What auto means: host if the run does not fit otherwise."""
    try:
        planner = make()
        placed = place_base(planner, BaseDevice.AUTO)
        if placed is planner:
            return BaseDevice.DEVICE
        placed.streamed()
        text = verdict(planner.plan())
    except Exception as error:  # a plan is advice: a model that cannot be planned may well run
        logger.warning("--base_device auto: device, as this run cannot be planned: %s", reason(error))
        return BaseDevice.DEVICE
    logger.info(f"--base_device auto: host, as with device {text}")
    return BaseDevice.HOST
