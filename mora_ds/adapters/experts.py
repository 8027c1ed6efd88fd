"""Experts of a mixture as targets: their frozen weights stay in one tensor a
projection, which gets a stack of MoRA matrices, one an expert.

    find_stacks(model)        name -> `ExpertStack` of every projection, such as model.layers.0.mlp.experts.down_proj
    MoRAExperts               the layer in place of that parameter: frozen stack (E, O, D), M (E, R, R)
    compute_sorted(module)    makes the module of the experts compute by `experts_forward`

transformers gives every experts' module of known layout the same marks
(integrations/moe.py, `use_experts_implementation`: is_transposed, has_gate, has_bias,
...), and lets an implementation of its forward be registered (`ExpertsInterface`); it
is chosen for each module by its config. Here tokens are sorted by expert, and

    y = W[e] x + decompress(M[e] compress(x))         over activations: no weight is formed

since a formed weight W + delta would be as large as the experts themselves, in every
layer that is not recomputed. compress is the same for all experts of a projection, so
that it is applied to each token once.

Shape legend:  T = tokens, K = experts a token, S = T K = rows, E = experts, O = d_out, D = d_in, R = r_hat.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_ds.adapters.layer import AdaptedLinear, ExpertStack
from mora_ds.adapters.ops.grouped import grouped_linear
from mora_ds.adapters.ops.index_tables import tables_of
from mora_ds.adapters.ops.mora import compress, decompress
from mora_ds.adapters.ops.stack import StackSpec
from mora_ds.common.errors import UserError

IMPLEMENTATION = "mora_ds"
"""Name of `experts_forward` among transformers' implementations."""

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of a module of experts; gate and up may be one tensor."""

_EXPERTS_A_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
)
"""Names of K in configs."""


class MoRAExperts(AdaptedLinear):
    """One projection of all experts: `MoRALinear` for each row, by the row's expert."""

    spec: StackSpec
    mora_matrix: nn.Parameter

    def __init__(self, base: ExpertStack, spec: StackSpec, dropout: float) -> None:
        super().__init__(base, spec, dropout)
        self.experts_per_token = base.experts_per_token
        self._tables_in_use: object = None

    def forward(self, x: Tensor, rows: Rows, spread: bool) -> Tensor:  # type: ignore[override]
        """(S, D) -> (S, O), or with `spread` (T, D) -> (S, O), K rows a token."""
        expert_spec = self.spec.operator
        self._tables_in_use = tables_of(expert_spec, x.device)
        z = compress(expert_spec, F.dropout(x, self.dropout, self.training))
        if spread:
            x = rows.spread(x)
            z = rows.spread(z)
        ends_in_z = rows.ends * expert_spec.blocks
        u = grouped_linear(z.flatten(0, -2), self.mora_matrix.to(x.dtype), ends_in_z)
        y = grouped_linear(x, self.frozen, rows.ends)
        return y + decompress(expert_spec, u.view_as(z))


@dataclass(frozen=True)
class Rows:
    """Which token each row is: one row for each of its experts, sorted by expert."""

    order: Tensor
    """(S,): row -> its place among the pairs (token, k), token by token."""
    expert: Tensor
    """(S,): row -> its expert."""
    ends: Tensor
    """(E,) int32: where the rows of each expert end."""
    per_token: int
    """K."""

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Rows:
        """`chosen`: (T, K), the experts of each token."""
        expert, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(experts, device=chosen.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        return cls(order, expert, ends, chosen.shape[1])

    def spread(self, x: Tensor) -> Tensor:
        """(T, ...) -> (S, ...). Its gradient sums the rows of a token in the order of
        its experts, on every device."""
        copies = x.unsqueeze(1).expand(-1, self.per_token, *x.shape[1:]).flatten(0, 1)
        return copies.index_select(0, self.order)

    def collect(self, x: Tensor) -> Tensor:
        """(S, D) -> (T, D), the sum of each token's rows."""
        placed = torch.zeros_like(x).index_copy(0, self.order, x)
        return placed.unflatten(0, (-1, self.per_token)).sum(1)


def experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """(T, D), the experts of each token (T, K) and their weights (T, K) -> (T, D).
    `experts`: a module of transformers with one `MoRAExperts` or two; names and order
    of the arguments are those of its own implementations."""
    rows = Rows.of(top_k_index, _stack_of(experts, "down_proj").shape[0])
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _project(experts, first, hidden_states, rows, spread=True)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = _project(experts, "down_proj", inner, rows, spread=False)
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)
    weighted = outer * top_k_weights.flatten()[rows.order].unsqueeze(-1)
    return rows.collect(weighted).to(hidden_states.dtype)


def _project(experts: Any, name: str, x: Tensor, rows: Rows, spread: bool) -> Tensor:
    projection = getattr(experts, name)
    if isinstance(projection, MoRAExperts):
        y = projection(x, rows, spread)
    else:
        stack = projection.mT if experts.is_transposed else projection
        y = grouped_linear(rows.spread(x) if spread else x, stack, rows.ends)
    return y + getattr(experts, f"{name}_bias")[rows.expert] if experts.has_bias else y


def _stack_of(experts: Any, name: str) -> Any:
    projection = getattr(experts, name, None)
    return projection.weight if isinstance(projection, MoRAExperts) else projection


def compute_sorted(experts: Any) -> None:
    """Makes a module of experts compute by `experts_forward`."""
    # Imported here, as it takes a second, and most models have no experts
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    config = copy.copy(experts.config)
    config._experts_implementation = IMPLEMENTATION
    experts.config = config


# -- which layouts are known -----------------------------------------------------------


def find_stacks(model: nn.Module) -> dict[str, ExpertStack | None]:
    """Name -> projection, for every tensor of three dimensions that is a projection of
    experts without MoRA matrices, before and after injection; None where the layout is
    not known."""
    stacks: dict[str, ExpertStack | None] = {}
    for path, module in model.named_modules():
        of_experts = "experts" in f"{path} {type(module).__name__}".lower()
        if isinstance(module, AdaptedLinear) or not of_experts:
            continue
        parameters = module.named_parameters(recurse=False)
        for name, tensor in (*parameters, *module.named_buffers(recurse=False)):
            if tensor.dim() == 3:
                stacks[f"{path}.{name}"] = _read(module, name, tensor)
    return stacks


def _read(module: Any, name: str, tensor: Tensor) -> ExpertStack | None:
    """The projection `name` of a module that transformers has marked; None for
    another."""
    marks = ("is_transposed", "has_gate", "has_bias", "has_post_expert_norm", "config")
    is_marked = all(hasattr(module, mark) for mark in marks)
    is_split = getattr(module, "_is_expert_parallel", False)
    if not is_marked or is_split or name not in PROJECTIONS:
        return None
    return ExpertStack(tensor, module.is_transposed, _experts_a_token(module.config))


def _experts_a_token(config: Any) -> int:
    """K; 0 where the config does not say, or has several numbers."""
    values = (getattr(config, key, None) for key in _EXPERTS_A_TOKEN)
    value = next(filter(None, values), 0)
    # HunYuan has a list with a number for each layer
    numbers = set(value) if isinstance(value, (list, tuple)) else {value}
    return numbers.pop() if len(numbers) == 1 else 0


def require_known(stacks: dict[str, ExpertStack | None], pattern: str) -> None:
    """Raises `UserError` naming the first projection whose layout is not known."""
    for name, stack in stacks.items():
        if stack is None:
            raise UserError(
                f"`target_modules` {pattern!r} includes {name}, experts of a layout that mora_ds does not know: their "
                "code is their own, or splits them over processes. Leave them out, and they stay frozen"
            )
