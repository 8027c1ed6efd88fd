"""What every job begins with: its processes, which start together with the same
settings and packages or not at all, its DeepSpeed config, and what it starts from.

`NODE_SETTINGS` lists what may differ from node to node. Every other setting is
compared: launchers such as `deepspeed --no_ssh`, torchrun and Slurm give each node a
command line of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from mora_ds.adapters.registry import ADAPTERS
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject, json_digest, sha256_file
from mora_ds.common.nested import flattened
from mora_ds.common.untrusted import expanded
from mora_ds.common.version import __version__
from mora_ds.config.arguments import Arguments, dump
from mora_ds.config.flags import Settings
from mora_ds.config.mixture import mixture_config
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.device import make_deterministic, warn_of_slow_precision
from mora_ds.engine.ds_config import compute_dtype, load_ds_config, resolve_ds_config
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.initialize import (
    check_compute_dtype,
    check_splittable,
    start_distributed,
)
from mora_ds.engine.muon import check_factors
from mora_ds.parallel.limits import check_world
from mora_ds.runtime.ranks import Ranks

if TYPE_CHECKING:
    from mora_ds.research.targets import TargetPlan
    from mora_ds.train.remote_folder import RemoteFolder

NODE_SETTINGS = frozenset(
    {
        "output_dir",  # one folder may be mounted in different places
        "cache_dir", "preprocessing_workers",
        # The model's config and the tokenizer are compared themselves.
        "model_name_or_path", "model_config", "tokenizer_name",
        "train_files", "eval_files", "dataset_name",  # the tokens are compared
        "deepspeed", "mixture",  # the content is compared
        "resume_from_checkpoint", "decay_from", "overwrite_output_dir",  # rank 0's hold
        "log_level",
    }
)  # fmt: skip
"""Settings that may differ from node to node: where files lie, and what concerns rank 0
or one node alone."""

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")
"""Packages besides mora_ds whose version may change a number, a file or a
collective."""

PACKAGE = Path(__file__).parents[1]

_REPORT_S = 30.0
"""How long a rank that has failed early waits for the others, to report why."""


@dataclass(frozen=True)
class RunContext:
    """The output folder of a run, and the checkpoint that it starts from."""

    ranks: Ranks
    folder: Path
    """The run's folder, which all ranks see."""
    checkpoint: Path | None
    """The checkpoint that the run resumes from."""
    state: TrainerState | None
    """Its state, which the run goes on with; None without a checkpoint."""
    branch: JsonObject = field(default_factory=dict)
    """What identifies the checkpoint of --decay_from, to be part of the run's
    identity."""
    targets: TargetPlan | None = None
    """The plan of research.targets."""
    remote: RemoteFolder | None = None
    """Where `folder` is uploaded to, if --output_dir is a URL."""


def end_all(error: Exception) -> None:
    """Join the process group, so that the other ranks raise the error of this one. Does
    nothing if they do not join."""
    try:
        if not dist.is_initialized():
            start_distributed(timeout_s=_REPORT_S)
    except (RuntimeError, UserError):
        return
    Ranks.current().abort(error)


def start_processes(arguments: Arguments) -> Ranks:
    """Join the process group and compare the settings of all ranks. Raises `UserError`
    where they differ. Only rank 0 shows progress bars, and only on a terminal."""
    training = arguments.training
    if training.deterministic:
        make_deterministic()
    start_distributed(timeout_s=training.collective_timeout_s)
    ranks = Ranks.current(training.collective_timeout_s)
    ranks.same("settings", settings_in_common(arguments))
    if not (ranks.is_rank0 and sys.stderr.isatty()):
        disable_progress_bar()
    return ranks


def settings_in_common(arguments: Arguments) -> Settings:
    """Flag, key of the DeepSpeed config, or package -> its value, for all that must be
    the same on every rank."""
    settings: Settings = {}
    for name, value in dump(arguments).items():
        if name not in NODE_SETTINGS:
            settings[f"--{name}"] = value
    mixture = mixture_config(arguments.data)
    settings["sources of the mixture"] = [
        replace(source, files=(), dataset=None) for source in mixture.sources
    ]
    settings["weights of the mixture"] = mixture.phases
    ds_config = load_ds_config(deepspeed_file(arguments.training))
    settings |= flattened(ds_config, "--deepspeed: ")
    for package in PACKAGES:
        settings[f"version of {package}"] = version(package)
    settings["version of mora_ds"] = __version__
    settings["sources of mora_ds (digest)"] = _sources_digest()
    return settings


def _sources_digest() -> str:
    """A digest of the package's modules, which may differ between nodes in checkouts of
    one version."""
    modules = {
        str(path.relative_to(PACKAGE)): sha256_file(path)
        for path in PACKAGE.rglob("*.py")
    }
    return json_digest(modules)[:16]


def deepspeed_file(training: TrainingArguments) -> Path | None:
    """The file of --deepspeed, where it is given."""
    if training.deepspeed is None:
        return None
    return expanded(training.deepspeed, "--deepspeed")


def engine_config(training: TrainingArguments, adapter: str, world: int) -> DsConfig:
    """The DeepSpeed config for `world` processes, complete but for ZeRO's bucket sizes.
    Raises `UserError` for groups of processes that do not fill the world, and a
    DeepSpeed file that contradicts flags."""
    check_world(world, training.tensor_parallel_size, training.sequence_parallel_size)
    settings = training.engine_settings()
    replicas = world // training.ranks_per_replica
    config = resolve_ds_config(deepspeed_file(training), settings, replicas)
    check_compute_dtype(config)
    warn_of_slow_precision(compute_dtype(config))
    check_splittable(config, training.tensor_parallel_size)
    if adapter in ADAPTERS and ADAPTERS[adapter].has_factors:
        check_factors(config)
    if training.sequence_parallel_size > 1:
        # It was compared with the flags above. DeepSpeed, which knows no groups, would
        # count the sequences of each rank.
        config.pop("train_batch_size")
    return config
