"""All ranks begin a run together: with the same settings and packages, or none of them.

`NODE_SETTINGS` lists what may differ from node to node. Every other setting is compared: launchers such as
`deepspeed --no_ssh`, torchrun and Slurm give each node a command line of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from mora_ds.common.errors import UserError
from mora_ds.common.nested import flattened
from mora_ds.common.untrusted import expanded
from mora_ds.common.version import __version__
from mora_ds.config.arguments import Arguments, dump
from mora_ds.config.mixture import mixture_plan
from mora_ds.engine.ds_config import load_ds_config
from mora_ds.engine.initialize import start_distributed
from mora_ds.runtime.ranks import Ranks

NODE_SETTINGS = frozenset(
    {
        "output_dir",  # one folder may be mounted in different places
        "cache_dir", "node_base", "preprocessing_workers",
        "model_name_or_path", "model_config", "tokenizer_name",  # the model's config and the tokenizer are compared
        "train_files", "eval_files", "dataset_name",  # the tokens are compared
        "deepspeed", "mixture",  # the content is compared
        "resume_from_checkpoint", "overwrite_output_dir",  # rank 0's hold
        "log_level",
    }
)  # fmt: skip
"""Settings that may differ from node to node: where files lie, and what concerns rank 0 or one node alone."""

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")
"""Packages whose version may change a number, a file or a collective; that of mora_ds is compared too."""

_REPORT_S = 30.0
"""How long a rank that fails before it has joined the others waits for them, to report why."""


@contextmanager
def start_up() -> Iterator[None]:
    """Inside the block, an error of one rank ends all ranks, with the same message and exit code.

    The rank that fails joins the others, if it has not yet, and they raise its error at the check that they come to
    next (`runtime/ranks.py`).
    """
    try:
        yield
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and _join():
            Ranks.current().leave(error)
        raise


def _join() -> bool:
    """Join the process group. False where the other ranks do not come."""
    try:
        if not dist.is_initialized():
            start_distributed(timeout_s=_REPORT_S)
    except (RuntimeError, UserError):
        return False
    return True


def check_settings(arguments: Arguments, ranks: Ranks) -> None:
    """Raise `UserError` that lists the settings and versions in which ranks differ. Collective."""
    ranks.same("settings", settings_in_common(arguments))


def settings_in_common(arguments: Arguments) -> dict[str, Any]:
    """Flag, key of the DeepSpeed config, or package -> its value, for all that must be the same on every rank."""
    flags = {f"--{name}": value for name, value in dump(arguments).items() if name not in NODE_SETTINGS}
    file = arguments.training.deepspeed
    plan = mixture_plan(arguments.data)
    ds_config = load_ds_config(None if file is None else expanded(file, "--deepspeed"))
    if plan is not None:
        flags["sources of the mixture"] = [replace(source, files=(), dataset=None) for source in plan.sources]
        flags["weights of the mixture"] = plan.phases
    versions = {f"version of {name}": version(name) for name in PACKAGES} | {"version of mora_ds": __version__}
    return {**flags, **flattened(ds_config, "--deepspeed: "), **versions}
