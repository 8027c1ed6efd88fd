"""The block `research:` of a recipe: its settings, and every check of them that needs no file."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from mora_ds.adapters.config import ALL_LINEAR, MoRAConfig
from mora_ds.adapters.domain_names import SHARED, Freeze
from mora_ds.adapters.ops.linear import Compute
from mora_ds.common.errors import COUNT, NOT_NEGATIVE, UserError, refusal, wrong_values
from mora_ds.config.adapter import AdapterKind
from mora_ds.config.arguments import Arguments
from mora_ds.config.flags import documented, typed_values
from mora_ds.config.mixture import mixture_plan
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.research.targets import AUTO, parse_budget

NAME = "research."


@dataclass(frozen=True)
@documented
class ResearchSettings:
    """Settings of the block."""

    targets: str | None = None
    """Which of --target_modules get a MoRA matrix, and its side: the file of a plan (mora-ds analyze --write), or auto
    (by how their weights use their rank, within trainable_budget). The plan is written to OUTPUT_DIR/targets.yaml;
    --mora_rank then only chooses the operator."""
    trainable_budget: str | None = None
    """With targets auto: parameters of all MoRA matrices, as a share of the model's (0.5%) or a number."""
    alignment_weight: float = 0.0
    """Adds the alignment loss with this weight: minus the share of the squared norm of each layer's update that lies in
    the leading subspaces of its frozen weight (mean over layers). 0 turns it off."""
    alignment_rank: int = 16
    """Number of left and of right singular vectors that span these subspaces."""
    domain_adapters: bool = False
    """Give every layer a MoRA matrix for each source of --mixture or --train_files in addition to the shared one. Each
    row of a batch uses the matrix of its source; a merge merges the shared ones."""
    freeze: str = Freeze.NONE.value
    """With domain_adapters: shared or domains freezes these MoRA matrices; none trains all."""
    init_adapter: str | None = None
    """With domain_adapters: start from the MoRA matrices of this checkpoint or adapter, which must have no merges;
    matrices of domains are matched by name."""
    eval_domains: list[str] = field(default_factory=list)
    """With domain_adapters: SET=DOMAIN evaluates a set with the MoRA matrices of that domain, SET=shared with the
    shared ones alone. Default: the domain with the set's name (or held_out_DOMAIN), the shared ones where there is
    none."""


def read(block: Any, path: str) -> dict[str, Any]:
    """The settings that a block of the recipe `path` sets. Raises `UserError` for unknown keys and wrong types."""
    return typed_values(block, get_type_hints(ResearchSettings), path, NAME)


def problems(arguments: Arguments) -> Iterator[str]:
    """One message for each setting that is wrong, or does not go with the others."""
    settings = ResearchSettings(**arguments.research)
    adapter = arguments.adapter
    for problem in wrong_values(settings, {"alignment_weight": NOT_NEGATIVE, "alignment_rank": COUNT}):
        yield problem.replace("--", NAME, 1)
    used = {
        "targets": settings.targets is not None,
        "alignment_weight": settings.alignment_weight != 0,
        "domain_adapters": settings.domain_adapters,
    }
    for name in (name for name, is_used in used.items() if is_used):
        if adapter.adapter != AdapterKind.MORA.value:
            yield f"{NAME}{name} is for MoRA matrices, and --adapter is {adapter.adapter}"
        if adapter.adapts_experts and (name != "targets" or settings.targets == AUTO):
            yield f"{NAME}{name} is for linear layers, and --target_modules names experts: leave out one of them"
        if arguments.training.tensor_parallel_size > 1 and name != "targets":
            yield f"{NAME}{name} needs unsplit MoRA matrices: leave --tensor_parallel_size at 1"
    if settings.alignment_rank != ResearchSettings.alignment_rank and settings.alignment_weight == 0:
        yield f"{NAME}alignment_rank is for {NAME}alignment_weight, and it is 0"
    yield from _target_problems(settings, arguments)
    yield from _domain_problems(settings, arguments)


def _target_problems(settings: ResearchSettings, arguments: Arguments) -> Iterator[str]:
    if settings.targets == AUTO and settings.trainable_budget is None:
        yield f"{NAME}targets auto: give {NAME}trainable_budget, such as 0.5%"
    if settings.trainable_budget is not None:
        yield from refusal(parse_budget, settings.trainable_budget)
        if settings.targets != AUTO:
            yield f"{NAME}trainable_budget is for {NAME}targets auto; the file of a plan holds the sides"
    if settings.targets not in (None, AUTO) and arguments.adapter.target_modules != [ALL_LINEAR]:
        yield f"{NAME}targets {settings.targets} names the layers itself: leave out --target_modules"


def _domain_problems(settings: ResearchSettings, arguments: Arguments) -> Iterator[str]:
    adapter = arguments.adapter
    training = arguments.training
    flag = f"{NAME}domain_adapters"
    if not settings.domain_adapters:
        for name in ("freeze", "eval_domains", "init_adapter"):
            if getattr(settings, name) not in (Freeze.NONE.value, [], None):
                yield f"{NAME}{name} is for {flag}"
        return
    try:
        sources = domain_names(arguments)
        if len(sources) < 2:
            yield f"{flag} needs several named sources, one a domain: --mixture, or --train_files NAME=FILES:WEIGHT ..."
        else:
            MoRAConfig(domains=sources, freeze=settings.freeze)
            for _, domain in eval_entries(settings.eval_domains):
                if domain not in (*sources, SHARED):
                    there = ", ".join((*sources, SHARED))
                    yield f"{NAME}eval_domains: there is no domain {domain!r}; there are: {there}"
    except UserError as error:
        yield str(error)
    is_muon = training.optimizer == OptimizerKind.MUON.value
    contradictions = {
        f"{flag}: --compute weight forms one weight for all rows; leave it at auto": (
            adapter.compute == Compute.WEIGHT.value
        ),
        f"{flag}: {NAME}trainable_budget counts one MoRA matrix a layer, and there are several; give the file of a plan"
        f" to {NAME}targets": settings.trainable_budget is not None,
        f"{flag}: {NAME}alignment_weight aligns one update a layer, and rows have several": (
            settings.alignment_weight != 0
        ),
        f"{flag}: --embedding_learning_rate would hold for the domains' MoRA matrices too: leave it out": (
            training.embedding_learning_rate is not None and not is_muon
        ),
        f"{flag}: --dry_run cannot plan Muon's state with domains: plan it with --optimizer adamw": (
            training.dry_run and is_muon
        ),
    }
    if settings.freeze == Freeze.SHARED.value:
        name = f"{NAME}freeze shared"
        contradictions[f"{name}: a merge would merge the shared matrices; leave out --merge_every"] = (
            adapter.merge_every > 0
        )
        contradictions[f"{name}: --optimizer muon trains the shared matrices (AdamW those of domains); use adamw"] = (
            is_muon
        )
    if settings.freeze == Freeze.DOMAINS.value and settings.init_adapter is None:
        yield (
            f"{NAME}freeze domains keeps the domains' MoRA matrices at zero: give those of an earlier run with "
            f"{NAME}init_adapter, or leave out {flag}"
        )
    yield from (message for message, holds in contradictions.items() if holds)


def domain_names(arguments: Arguments) -> tuple[str, ...]:
    """The sources of the mixture, each of which is a domain."""
    plan = mixture_plan(arguments.data)
    return () if plan is None else tuple(source.name for source in plan.sources)


def eval_entries(entries: list[str]) -> Iterator[tuple[str, str]]:
    """(evaluation set, domain) of each entry SET=DOMAIN. Raises `UserError`."""
    seen = set()
    for entry in entries:
        name, mark, domain = entry.rpartition("=")
        if not mark or not name or not domain:
            raise UserError(f"{NAME}eval_domains {entry}: must be SET=DOMAIN")
        if name in seen:
            raise UserError(f"{NAME}eval_domains: {name} is given twice")
        seen.add(name)
        yield name, domain
