"""The settings of a recipe's `research:` block, and checks that need no files."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from mora_ds.adapters.config import ALL_LINEAR, MoRAConfig
from mora_ds.adapters.ops.linear import Compute
from mora_ds.common.errors import refusal
from mora_ds.config.adapter import AdapterKind
from mora_ds.config.arguments import Arguments
from mora_ds.config.flags import Settings, documented, typed_values
from mora_ds.config.mixture import mixture_plan

NAME = "research."


@dataclass(frozen=True)
@documented
class ResearchSettings:
    """Settings of the `research:` block."""

    targets: str | None = None
    """File of a target plan (mora-ds analyze --write): the layers that get a MoRA matrix,
    and the matrix sizes. --mora_rank then only affects the choice of the operator."""
    domain_adapters: bool = False
    """Give every layer a MoRA matrix for each source of --mixture or --train_files in
    addition to the shared one. Each sequence of a batch uses the matrix of its source; a
    merge merges the shared ones."""


def read(block: Any, path: str) -> Settings:
    """The settings in the block of the recipe `path`. Raises `UserError` for unknown
    keys and wrong types."""
    return typed_values(block, get_type_hints(ResearchSettings), path, NAME)


def problems(arguments: Arguments) -> Iterator[str]:
    """One message for each setting that is invalid or contradicts another one."""
    settings = ResearchSettings(**arguments.research)
    adapter = arguments.adapter
    for name in ("targets", "domain_adapters"):
        if not getattr(settings, name):
            continue
        if adapter.adapter != AdapterKind.MORA:
            yield f"{NAME}{name} is for MoRA matrices, and --adapter is {adapter.adapter}"
        if adapter.adapts_experts:
            yield f"{NAME}{name} is for linear layers, and --target_modules names experts: leave out one of them"
    if settings.targets is not None and adapter.target_modules != [ALL_LINEAR]:
        yield f"{NAME}targets {settings.targets} already names the layers: leave out --target_modules"
    if settings.domain_adapters:
        yield from _domain_problems(arguments)


def _domain_problems(arguments: Arguments) -> Iterator[str]:
    training = arguments.training
    flag = f"{NAME}domain_adapters"
    names = domain_names(arguments)
    if len(names) < 2:
        yield f"{flag} needs several named sources, one per domain: --mixture, or --train_files NAME=FILES:WEIGHT ..."
    yield from refusal(lambda: MoRAConfig(domains=names))
    contradictions = {
        "it needs unsplit MoRA matrices: leave --tensor_parallel_size at 1": (
            training.tensor_parallel_size > 1
        ),
        "--compute weight uses one weight for all sequences; leave it at auto": (
            arguments.adapter.compute == Compute.WEIGHT
        ),
        "--embedding_learning_rate would also apply to the domains' MoRA matrices: leave it out": (
            training.embedding_learning_rate is not None and not training.has_muon
        ),
        "--dry_run cannot plan Muon's state with domains: plan it with --optimizer adamw": (
            training.dry_run and training.has_muon
        ),
    }
    for message, is_broken in contradictions.items():
        if is_broken:
            yield f"{flag}: {message}"


def domain_names(arguments: Arguments) -> tuple[str, ...]:
    """The domains: the names of the mixture's sources."""
    plan = mixture_plan(arguments.data)
    return () if plan.is_plain else tuple(source.name for source in plan.sources)
