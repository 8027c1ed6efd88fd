"""The alignment loss: how much of a delta lies in the frozen weight's leading
subspaces.

    share(M) = |Uq D Vq^T|^2 / (|D|^2 + (FLOOR |W0|)^2)     D = delta_weight(M); Uq, Vq: q leading singular vectors

The floor makes the share and its gradient 0 at M = 0, where the quotient alone has no
limit; a delta of a thousandth of the weight's norm counts half of what its direction
would give, a larger one almost all of it. One layer's D is formed at a time, in fp32,
in forward and again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import AdaptedLinear, ExpertStack
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.target_modules import targets_of
from mora_ds.common.errors import RunError, UserError
from mora_ds.engine.device import current_device
from mora_ds.models.load import LoadedBase
from mora_ds.models.svd import leading_vectors
from mora_ds.runtime.ranks import Ranks

FLOOR = 1e-3
"""Share of the weight's norm whose square is added to that of the delta's norm."""


@dataclass(frozen=True)
class Leading:
    """The leading directions of a frozen weight W0 (d_out, d_in), in fp32."""

    left: Tensor
    """(q, d_out): left singular vectors, one a row, the leading ones first."""
    right: Tensor
    """(q, d_in): the right ones, in the same order."""
    norm: float
    """Frobenius norm of W0."""

    def to(self, device: torch.device | str) -> Leading:
        """The same on a device."""
        return Leading(self.left.to(device), self.right.to(device), self.norm)

    def share(self, spec: UpdateSpec, square: Tensor) -> Tensor:
        """The share of M (r_hat, r_hat), from 0 to 1, computed in fp32 or float64."""
        dtype = torch.promote_types(square.dtype, torch.float32)
        delta = spec.delta_weight(square.to(dtype))
        inside = self.left.to(delta) @ delta @ self.right.to(delta).T
        return inside.square().sum() / (delta.square().sum() + (FLOOR * self.norm) ** 2)


def leading_of_base(
    config: MoRAConfig, loaded: LoadedBase, rank: int, ranks: Ranks
) -> dict[str, Leading]:
    """{module: its `rank` leading directions} of every linear layer that will be
    adapted, before injection. Collective.

    Rank 0 decomposes the original weights, one at a time; the others receive its bits.
    Nothing is stored: a resumed run decomposes them again, and finds the same bits on
    the same machine with as many threads. Raises `UserError` naming a weight that is
    not finite, or has fewer singular vectors than `rank`.
    """
    device = current_device()

    def decompose() -> dict[str, Leading]:
        directions = {}
        for name, module in targets_of(loaded.model, config).items():
            if isinstance(module, ExpertStack):
                raise UserError(
                    f"research.alignment_weight: {name} are experts: leave them out"
                )
            key = loaded.keys[f"{name}.weight"]
            weight = loaded.base.read(key).to(device, torch.float64)
            if rank > min(weight.shape):
                raise UserError(
                    f"research.alignment_rank {rank}: {name} has {min(weight.shape)} singular vectors"
                )
            if not torch.isfinite(weight).all():
                raise UserError(
                    f"{loaded.base.folder}: {key} has NaN or infinite values, and no singular vectors"
                )
            weight = weight.T if isinstance(module, Conv1D) else weight
            left, right = leading_vectors(weight, rank, name)
            leading = Leading(left.float(), right.float(), weight.norm().item())
            directions[name] = leading.to("cpu")
        return directions

    on_cpu = ranks.on_first("singular vectors of the base", decompose, long=True)
    return {name: leading.to(device) for name, leading in on_cpu.items()}


class Alignment:
    """The alignment loss of a model, made after `inject` and before `initialize`."""

    name = "alignment"

    def __init__(
        self, model: nn.Module, leading: Mapping[str, Leading], weight: float
    ) -> None:
        """`leading`: the directions that span the leading subspaces
        (`leading_of_base`)."""
        layers = mora_layers(model)
        self.weight = weight
        self.layers = len(layers)
        self.value = torch.zeros(())
        """The mean share over layers at the latest `loss`, for logs."""
        self._shares: dict[str, Tensor] = {}
        self._recording = False
        for name, layer in layers.items():
            layer.register_forward_hook(
                partial(self._after_forward, name, leading[name])
            )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Surrounds a forward whose `loss` is wanted."""
        self._shares.clear()
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def loss(self) -> Tensor:
        """The term that the latest forward adds to its loss; layers that it did not use
        contribute 0. Raises `RunError` where there was no forward in training mode
        within `recording`."""
        if not self._shares:
            raise RunError(
                "no layer recorded its share: run the model in training mode, within Alignment.recording()"
            )
        mean = torch.stack(list(self._shares.values())).sum() / self.layers
        self._shares.clear()
        self.value = mean.detach()
        return -self.weight * mean

    def _after_forward(
        self,
        name: str,
        leading: Leading,
        layer: AdaptedLinear,
        inputs: object,
        output: Tensor,
    ) -> Tensor:
        """Forward hook of one layer, in training: notes its share."""
        if not (layer.training and torch.is_grad_enabled()):
            return output
        # Also where nobody records: gradient checkpointing runs the layer again in
        # backward, and autograd expects the same operations there.
        output, share = _WithShare.apply(output, layer.value, layer.spec, leading)
        if self._recording:
            self._shares[name] = share
        return output


class _WithShare(torch.autograd.Function):
    """(output, M) -> (output, share of M's delta). Part of the layer's graph, since
    ZeRO-3 has M whole only while the layer runs, in forward and in backward."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, square: Tensor, spec: UpdateSpec, leading: Leading
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        ctx.leading = leading
        ctx.save_for_backward(square)
        return output.detach(), leading.share(spec, square)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        g_output, g_share = gradients
        if g_share is None or not ctx.needs_input_grad[1]:
            return g_output, None, None, None
        (square,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = square.detach().requires_grad_()
            share = ctx.leading.share(ctx.spec, leaf)
            (g_square,) = torch.autograd.grad(share, leaf, g_share)
        return g_output, g_square, None, None
