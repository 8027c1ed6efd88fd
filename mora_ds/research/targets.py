"""Target plans: the layers that get a MoRA matrix, and the sides of the matrices.

    targets.yaml      format, fingerprint, layers: {name: side}

A layer with side 0, or without a line, gets no matrix. `mora-ds analyze` writes the
file; users may edit it, and pass it as `research.targets`. A run uses it as
`MoRAConfig.layer_sizes`, which is saved in checkpoints, adapters and exports: a resumed
run must have the sides of its checkpoint.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml

from mora_ds.common.errors import Bounds, UserError
from mora_ds.common.files import atomic_path, load_yaml
from mora_ds.common.untrusted import MAX_SIDE, FileName, expanded, shown, typed
from mora_ds.config.arguments import Arguments
from mora_ds.config.research import TARGETS, ResearchSettings, domain_names
from mora_ds.models.base import BaseCheckpoint

_HEAD = """\
# Side (r_hat) of each layer's MoRA matrix, which has r_hat^2 parameters. For research.targets of a recipe.
# You may edit it: 0, or no line, means no matrix; sides must be even for rotate, and at most the layer's longer side,
# with subspace the shorter one.
"""


@dataclass(frozen=True)
class TargetPlan:
    """The content of the file: sides of the MoRA matrices of a model's layers."""

    fingerprint: str
    """`BaseCheckpoint.fingerprint` of the plan's base."""
    layers: dict[FileName, Annotated[int, Bounds(least=0, most=MAX_SIDE)]]
    """Layer -> r_hat, in the model's order; 0: no matrix."""
    format: int = 1

    def write(self, path: Path) -> None:
        """Write the file atomically. Raises `RunError` on a full disk."""
        with atomic_path(path) as temporary:
            content = yaml.safe_dump(vars(self), sort_keys=False, width=10_000)
            temporary.write_text(_HEAD + content, encoding="utf-8")

    def apply_to(self, config: Any) -> Any:
        """A copy of `config`, of an adapter with `Capability.LAYER_SIZES`, with matrices
        of these sides on these layers only. Raises `UserError` for a side that the
        operator does not support."""
        sizes = tuple((name, side) for name, side in self.layers.items() if side)
        return replace(config, layer_sizes=sizes)

    def check_base(self, base: BaseCheckpoint, fingerprint: str) -> None:
        """Raise `UserError` unless `base`, with this `fingerprint`, is the plan's
        model."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{TARGETS}: the plan is for a model with the fingerprint {shown(self.fingerprint)}; {base.folder} has "
                f"{fingerprint}: create a plan for it (mora-ds analyze --write)"
            )


def read_plan(path: Path) -> TargetPlan:
    """Read a plan. Raises `UserError` that names the file if it is invalid YAML or has
    an invalid key or side."""
    where = f"{TARGETS} {path}"
    plan: TargetPlan = typed(TargetPlan, load_yaml(str(path), TARGETS), where)
    if plan.format != 1:
        raise UserError(f"{where}: format is {plan.format}, and only 1 is supported")
    if not any(plan.layers.values()):
        raise UserError(f"{where}: no layer has a side above 0")
    return plan


def target_plan_of(arguments: Arguments) -> TargetPlan | None:
    """The plan that a recipe names, if it names one. Raises `UserError` as `read_plan`
    does, and for sides that the operator cannot have."""
    targets = ResearchSettings(**arguments.research).targets
    if targets is None:
        return None
    plan = read_plan(expanded(targets, TARGETS))
    plan.apply_to(arguments.adapter.config(seed=0))
    return plan


def researched(config: Any, arguments: Arguments, plan: TargetPlan | None) -> Any:
    """The adapter's config of a run with the domains and the plan of its recipe."""
    if ResearchSettings(**arguments.research).domain_adapters:
        config = replace(config, domains=domain_names(arguments))
    return config if plan is None else plan.apply_to(config)
