"""The settings of a recipe's `research:` block, and checks that need no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mora_ds.adapters.domain_names import domain_validation_errors
from mora_ds.adapters.registry import Capability, unsupported
from mora_ds.adapters.target_patterns import ALL_LINEAR
from mora_ds.common.errors import COUNT, NOT_NEGATIVE, unknown, wrong_values
from mora_ds.config.mixture import mixture_config

if TYPE_CHECKING:
    from mora_ds.config.arguments import Arguments

RESEARCH = "research"
"""The key of a recipe that holds the block."""

TARGETS = f"{RESEARCH}.targets"
DOMAINS = f"{RESEARCH}.domain_adapters"
ALIGNMENT = f"{RESEARCH}.alignment_weight"
ALIGNMENT_RANK = f"{RESEARCH}.alignment_rank"
SIDES = f"{RESEARCH}.sides"

WEIGHT = "weight"
GRADIENT = "gradient"
"""Values of `sides`."""


@dataclass(frozen=True)
class ResearchSettings:
    """Settings of the `research:` block."""

    targets: str | None = None
    """File of a target plan (mora-ds analyze --write): the layers that get a MoRA matrix,
    and the matrix sizes. --mora_rank then only affects the choice of the operator."""
    alignment_weight: float = 0.0
    """Add the alignment loss with this weight: minus the fraction of each layer's update,
    by its squared norm, that lies in the leading subspaces of the frozen weight (mean
    over layers). 0: no such loss."""
    alignment_rank: int = 16
    """Number of left and of right singular vectors that span these subspaces."""
    sides: str = WEIGHT
    """Sides of --adapter subspace: weight, the leading singular vectors of the frozen
    weight, or gradient, those of its mean gradient over the run's first 16 sequences, anew
    after every merge."""
    domain_adapters: bool = False
    """Give every layer a MoRA matrix for each source of --mixture or --train_files in
    addition to the shared one. Each sequence of a batch uses the matrix of its source; a
    merge merges the shared ones."""


def research_problems(arguments: Arguments) -> Iterator[str]:
    """One message for each setting that is invalid or contradicts another one."""
    settings = ResearchSettings(**arguments.research)
    adapter = arguments.adapter
    limits = {"alignment_weight": NOT_NEGATIVE, "alignment_rank": COUNT}
    for problem in wrong_values(settings, limits):
        yield problem.replace("--", f"{RESEARCH}.", 1)
    if settings.sides not in (WEIGHT, GRADIENT):
        yield unknown(SIDES, settings.sides, (WEIGHT, GRADIENT))
    if settings.sides != WEIGHT and adapter.adapter != "subspace":
        yield f"{SIDES} is for --adapter subspace: leave it out"
    needs = {
        "targets": Capability.LAYER_SIZES,
        "alignment_weight": Capability.ALIGNMENT,
        "domain_adapters": Capability.DOMAINS,
    }
    for name, capability in needs.items():
        if not getattr(settings, name):
            continue
        yield from unsupported(adapter.adapter, capability, f"{RESEARCH}.{name}")
        if adapter.adapts_experts:
            yield (
                f"{RESEARCH}.{name} is for linear layers, and --target_modules names experts: leave out one of them"
            )
    if settings.targets is not None and adapter.target_modules != [ALL_LINEAR]:
        yield f"{TARGETS} {settings.targets} already names the layers: leave out --target_modules"
    if settings.alignment_weight and arguments.training.tensor_parallel_size > 1:
        yield f"{ALIGNMENT} needs unsplit MoRA matrices: leave --tensor_parallel_size at 1"
    if settings.domain_adapters:
        yield from _domain_problems(arguments)


def _domain_problems(arguments: Arguments) -> Iterator[str]:
    training = arguments.training
    names = domain_names(arguments)
    if len(names) < 2:
        yield f"{DOMAINS} needs a named source per domain, several: --mixture, or --train_files NAME=FILES:WEIGHT ..."
    yield from domain_validation_errors(names)
    contradictions = {
        f"{ALIGNMENT} aligns one update a layer, and domains have several": (
            bool(arguments.research.get("alignment_weight"))
        ),
        "it needs unsplit MoRA matrices: leave --tensor_parallel_size at 1": (
            training.tensor_parallel_size > 1
        ),
        "--compute weight uses one weight for all sequences; leave it at auto": (
            arguments.adapter.compute == "weight"
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
            yield f"{DOMAINS}: {message}"


def domain_names(arguments: Arguments) -> tuple[str, ...]:
    """The domains: the names of the mixture's sources."""
    mixture = mixture_config(arguments.data)
    return () if mixture.is_plain else tuple(source.name for source in mixture.sources)
