"""A frozen linear layer with one trainable tensor: `MoRALinear` and `LoRALinear`.

The frozen weight and bias are non-persistent *buffers*: DeepSpeed partitions parameters
only, so that every rank has them unsharded and no collective ever carries them. With 8
bits the weight is int8, with 4 bits it is packed in uint8 (`nf4`), and its scales are
another buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters import nf4
from mora_ds.adapters.kernels.linear import KernelProducts
from mora_ds.adapters.kernels.ops import KERNEL_DEVICES
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.nf4 import NF4Weight
from mora_ds.adapters.ops import int8
from mora_ds.adapters.ops.frozen import Weight, check_floating, dense, frozen_linear
from mora_ds.adapters.ops.index_tables import tables_of
from mora_ds.adapters.ops.int8 import Int8Weight
from mora_ds.adapters.ops.linear import (
    Compute,
    LayerProducts,
    mora_linear,
)
from mora_ds.adapters.ops.lora import LoRASpec, lora_update
from mora_ds.adapters.ops.mora import OperatorSpec, mora_update
from mora_ds.adapters.ops.spec import AdditiveTerm, Update, UpdateSpec
from mora_ds.adapters.ops.updates import join, merged_weight


class Split(Protocol):
    """How the ranks of a group compute a layer
    (`parallel.tensor_parallel.LayerSplit`)."""

    def __call__(
        self,
        layer: MoRALinear,
        x: Tensor,
        mora_matrix_shard: Tensor,
    ) -> Tensor:
        """This rank's part of the layer's output, from its shard of M."""

    def shard(self, matrix: Tensor) -> Tensor:
        """This rank's shard of M."""

    def unshard(self, mora_matrix_shard: Tensor) -> Tensor:
        """M, from the shards of all ranks. Collective."""


class MergeNorms(NamedTuple):
    """Frobenius norms of a merge, each a scalar on the layer's device."""

    mora_matrix: Tensor
    delta: Tensor
    """Of the change of the weight; `weight` is that of the frozen weight before the merge."""
    weight: Tensor
    lost: Tensor
    """Norm of the part of the delta that rounding keeps out of the frozen weight."""


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32)


class ExpertStack(nn.Module):
    """The weights (E, d_out, d_in) of one projection of all experts, or
    (E, d_in, d_out) when `transposed`: what stands for the parameter of transformers
    until a layer takes its place."""

    bias = None

    def __init__(
        self, weight: Tensor, transposed: bool, experts_per_token: int
    ) -> None:
        """`experts_per_token`: how many compute a token; 0 where that is not known."""
        super().__init__()
        self.weight = weight
        self.transposed = transposed
        self.experts_per_token = experts_per_token
        self.count = len(weight)
        sides = weight.shape[1:]
        self.out_features, self.in_features = sides[::-1] if transposed else sides


class AdaptedLinear(nn.Module):
    """y = W0 x + b + update(dropout(x)): what all adapters have in common. An adapter
    whose output is no such sum has a `forward` of its own in place of `update`.

    Input (..., d_in), output (..., d_out). `weight` keeps the layout of the layer that
    it comes from: (d_out, d_in), or (d_in, d_out) when `transposed` (GPT-2's Conv1D),
    unless it is packed. The only parameter is the adapter weight, named `spec.adapter_weight_name`.
    """

    weight: Tensor
    weight_scales: Tensor | None
    """fp32, where `weight` is int8, (d_out,), or packed (`quantize`)."""
    bias: Tensor | None
    fixed: Tensor | None
    """What is not trained of the adapter weight (`UpdateSpec.trained_shape`), as a run
    has set it: not a number until then."""
    spec: UpdateSpec

    def __init__(
        self,
        base: Any,
        spec: UpdateSpec,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Takes over the tensors of `base` (`nn.Linear`, `Conv1D` or `ExpertStack`)
        without copying them. `seed`: of the initial adapter weight."""
        super().__init__()
        # An `ExpertStack` says it itself
        self.transposed: bool = getattr(base, "transposed", isinstance(base, Conv1D))
        self.in_features, self.out_features = linear_shape(base)
        weight = base.weight.data
        bias = None if base.bias is None else base.bias.data
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("weight_scales", None, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.spec = spec
        adapter_weight = spec.init_weight(self.frozen, seed).to(
            weight.device, weight.dtype
        )
        self.register_parameter(spec.adapter_weight_name, nn.Parameter(adapter_weight))
        self.register_buffer("fixed", None, persistent=False)
        self.dropout = dropout
        self.split: Split | None = None
        """Under tensor parallelism, where the parameter is this rank's shard of a
        adapter weight."""
        self.merged: tuple[AdditiveTerm, ...] = ()
        """Updates of merged cycles, where `weight` is packed and does not take them
        up."""
        self._merged_tables: tuple[object, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        y = frozen_linear(x, self.frozen_for(x), self.bias)
        return y + self.update(F.dropout(x, self.dropout, self.training))

    def update(self, x: Tensor) -> Tensor:
        """What the adapter adds: (..., d_in) -> (..., d_out)."""
        raise NotImplementedError

    @property
    def adapter_weight(self) -> nn.Parameter:
        """The adapter weight: M (r_hat, r_hat), or LoRA's factors
        (rank, d_in + d_out)."""
        return getattr(self, self.spec.adapter_weight_name)

    def unshard(self, adapter_weight_shard: Tensor) -> Tensor:
        """The unsharded adapter weight of which this rank's parameter is a shard, with
        what is fixed of it. Collective."""
        if self.split is not None:
            return self.split.unshard(adapter_weight_shard)
        if self.fixed is None:
            return adapter_weight_shard
        fixed = self.fixed.to(adapter_weight_shard)
        return torch.cat((adapter_weight_shard, fixed), dim=-1)

    def shard(self, adapter_weight: Tensor) -> Tensor:
        """The part of an unsharded adapter weight that this rank's parameter holds."""
        return (
            adapter_weight if self.split is None else self.split.shard(adapter_weight)
        )

    def set_fixed(self, adapter_weight: Tensor) -> None:
        """Takes what is fixed of an unsharded adapter weight, in the layer's dtype."""
        fixed = adapter_weight[..., self.spec.trained_shape[-1] :]
        if fixed.shape[-1]:
            self.fixed = fixed.detach().to(self.device, self.dtype, copy=True)

    def fixed_of(self, original: Tensor) -> Tensor:
        """What is fixed of the adapter weight in a new run, from the layer's base weight
        (d_out, d_in) in fp64; for adapters that have such a part."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight in its layout, also where it is packed."""
        if not self.is_packed:
            return tuple(self.weight.shape)
        sides = self.out_features, self.in_features
        return sides[::-1] if self.transposed else sides

    @property
    def stored_weight(self) -> Tensor:
        """`weight` as (d_out, d_in), a view. Not of a packed one."""
        return self.weight.mT if self.transposed else self.weight

    @property
    def is_packed(self) -> bool:
        """Whether the weight is held in 4 bits."""
        return self.weight.dtype is torch.uint8

    def frozen_on(self, device: torch.device, copy: bool = False) -> Weight:
        """What the layer multiplies by, (d_out, d_in), on a device: a view of `weight`,
        or a quantized weight. With `copy` one that a merge does not change."""
        scales = self.weight_scales
        if scales is not None and self.is_packed:
            # No copy, as merges do not write to packed weights
            shape = self.out_features, self.in_features
            return NF4Weight(
                self.weight.to(device), scales.to(device), shape, self.merged
            )
        stored = self.stored_weight.to(device, copy=copy)
        if scales is None:
            return stored
        return Int8Weight(stored, scales.to(device, copy=copy))

    @property
    def frozen(self) -> Weight:
        """`frozen_on` the device where the weight is."""
        return self.frozen_on(self.weight.device)

    def frozen_for(self, x: Tensor) -> Weight:
        """What x is multiplied by. Raises `UserError` where a model has cast it to the
        integers of a quantized weight."""
        if self.weight_scales is None:
            return self.weight.mT if self.transposed else self.weight
        frozen = self.frozen
        check_floating(x, frozen)
        return frozen

    @property
    def device(self) -> torch.device:
        """Where the layer computes; the weight may wait elsewhere
        (`engine.layer_prefetcher`)."""
        return self.adapter_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self.adapter_weight.dtype

    def quantize(self, original: Tensor, bits: int) -> None:
        """Holds `original`, in the weight's layout, in 8 or 4 bits in place of
        `weight`; it is not kept itself. Raises `RunError` where it is not finite."""
        original = original.mT if self.transposed else original
        if bits == NF4Weight.bits:
            self.weight, self.weight_scales = nf4.quantize(original)
            return
        values, self.weight_scales = int8.quantize(original)
        self.weight = values.mT.contiguous() if self.transposed else values

    @torch.no_grad()
    def rebuild_weight(
        self,
        original: Tensor,
        updates: Iterable[Update],
        keep: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Forms the frozen weight anew: `original` with all updates merged, in fp32.
        `keep` gets that sum, in the layout of `weight`, unless the weight is packed.

        It is rounded once, to the weight's dtype or to 8 bits. As it starts at the
        base weight, rounding errors do not accumulate over merges. In 4 bits the
        original alone is rounded, and the updates stay as matrices next to it (`nf4`). In
        place, so that storages and ties stay. `original`, in the layout of `weight`, is
        not written to.
        """
        scales = self.weight_scales
        if scales is not None and self.is_packed:
            matrix = original.T if self.transposed else original
            packed, new_scales = nf4.quantize(matrix.to(self.device))
            self.weight.copy_(packed)
            scales.copy_(new_scales)
            self.set_merged(updates)
            return
        fp32 = torch.float32
        weight = merged_weight(original, updates, self.transposed, fp32, self.device)
        if keep is not None:
            keep(weight)
        if scales is None:
            self.weight.copy_(weight)
            return
        values, new_scales = int8.quantize(weight.mT if self.transposed else weight)
        self.stored_weight.copy_(values)
        scales.copy_(new_scales)

    @torch.no_grad()
    def merge(
        self,
        original: Tensor,
        updates: Iterable[Update],
        mora_matrix: Tensor,
        keep: Callable[[Tensor], None] | None = None,
    ) -> MergeNorms:
        """Form the weight with this cycle's M, the unsharded fp32 `mora_matrix`, which is
        the last of `updates`. `keep`: as in `rebuild_weight`. Returns the norms of the
        merge."""
        old = self.frozen_on(self.device, copy=True)
        if self.is_packed:
            # The original's 4 bits stay as they are
            self.set_merged(updates)
        else:
            self.rebuild_weight(original, updates, keep)
        before = _norm(dense(old, torch.float32))
        moved = None
        if self.weight.dtype is not torch.float32:
            moved = dense(self.frozen_on(self.device), torch.float32).float()
            moved.sub_(dense(old, torch.float32))
        base = None if self.spec.is_additive else dense(old, torch.float32).float()
        # Its memory is free before the delta takes as much
        del old
        delta = self.spec.weight_change(base, mora_matrix)
        lost = before.new_zeros(()) if moved is None else _norm(moved.sub_(delta))
        trained = self.spec.trained(mora_matrix)
        return MergeNorms(_norm(trained), _norm(delta), before, lost)

    def set_merged(self, updates: Iterable[Update]) -> None:
        """Let the layer add these updates of merged cycles to a packed weight from now
        on, in place of earlier ones."""
        device = self.device
        dtype = self.dtype
        joined = join(
            (spec, adapter_weight.to(device)) for spec, adapter_weight in updates
        )
        self.merged = tuple(
            (spec, adapter_weight.to(dtype)) for spec, adapter_weight in joined
        )
        self._cache_merged_tables()

    def _cache_merged_tables(self) -> None:
        """Keeps the tables of merged cycles, which are too many for a cache."""
        self._merged_tables = tuple(spec.tables(self.device) for spec, _ in self.merged)

    def read(self) -> Tensor:
        """The frozen weight in its layout, maybe itself; in fp32 if it is quantized."""
        weight = dense(self.frozen, torch.float32)
        return weight.mT if self.transposed else weight

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> AdaptedLinear:
        """Moves but does not cast scales: `module.to(bf16)` would round them, and with
        them every weight. Casts the terms of merged cycles, as it casts the matrix."""
        scales = self.weight_scales
        super()._apply(fn, recurse)
        self.weight_scales = None if scales is None else scales.to(self.device)
        self.merged = tuple(
            (spec, fn(adapter_weight)) for spec, adapter_weight in self.merged
        )
        self._cache_merged_tables()
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self.spec.adapter_weight_name}={tuple(self.adapter_weight.shape)}, operator={self.spec.describe()}"
        )


class MoRALinear(AdaptedLinear):
    """y = W0 x + b + decompress(M compress(dropout(x))), with M (r_hat, r_hat)
    trained."""

    spec: OperatorSpec
    mora_matrix: nn.Parameter

    def __init__(
        self,
        base: Any,
        spec: OperatorSpec,
        dropout: float = 0.0,
        compute: Compute = Compute.AUTO,
    ) -> None:
        super().__init__(base, spec, dropout)
        self.compute = compute
        self.tables: KernelTables | None = None
        self._tables_in_use: object = None

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and self.dropout
        # A graph has the update by itself, as `torch.compile` traces no other path
        if self.split is None and (drops or torch.compiler.is_compiling()):
            return super().forward(x)
        mora_matrix = self.mora_matrix.to(x.dtype)
        if self.split is not None:
            return self.split(self, x, mora_matrix)
        weight = self.frozen_for(x)
        products: LayerProducts
        if x.device.type in KERNEL_DEVICES:
            products = KernelProducts(self.kernel_tables(x.device))
        else:
            # Kept as long as the layer uses them, however many other layers there are
            self._tables_in_use = tables_of(self.spec, x.device)
            products = LayerProducts(self.spec)
        return mora_linear(x, weight, self.bias, mora_matrix, products, self.compute)

    def kernel_tables(self, device: torch.device) -> KernelTables:
        """The operator's index tables on a device, made anew for another operator."""
        tables = self.tables
        if tables is None or tables.spec != self.spec or tables.fold.device != device:
            self.tables = tables = KernelTables(self.spec, device)
        return tables

    def update(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._tables_in_use = tables_of(self.spec, x.device)
        return mora_update(self.spec, self.mora_matrix.to(x.dtype), x)


class LoRALinear(AdaptedLinear):
    """y = W0 x + b + (alpha / r) B A dropout(x), with [A | B^T]
    (rank, d_in + d_out)."""

    spec: LoRASpec
    factors: nn.Parameter

    def update(self, x: Tensor) -> Tensor:
        return lora_update(self.spec, self.factors.to(x.dtype), x)


def mora_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Module name -> adapted layer, in the model's order, the same on every rank."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }


def adapter_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters of all adapters, those of domains included."""
    return {
        f"{name}.{parameter}"
        for name, layer in mora_layers(model).items()
        for parameter, _ in layer.named_parameters(recurse=False)
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes as `nn.Linear` or `Conv1D`, and can take an adapter."""
    if not isinstance(module, nn.Linear):
        return isinstance(module, Conv1D)
    return type(module).forward is nn.Linear.forward or _computes_linear(module)


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Whether a subclass's own `forward` is still W x + b (Falcon's is, a router's is
    not), by trying it: in bf16, as one that returns fp32 whatever its input shows only
    there, and weights may not be in the run's dtype yet. Tensors of the meta device are
    tried as random numbers."""
    generator = torch.Generator().manual_seed(0)

    def tried(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            numbers = torch.randn(tensor.shape, generator=generator, device="cpu")
            tensor = numbers.to(tensor.dtype)
        return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor

    named = (*module.named_parameters(), *module.named_buffers())
    tensors = {name: tried(tensor) for name, tensor in named}
    numbers = torch.randn(3, module.in_features, generator=generator, device="cpu")
    x = tried(numbers).to(tensors["weight"].device)
    try:
        output = functional_call(module, tensors, x)
        expected = F.linear(x, tensors["weight"], tensors.get("bias"))
    except (TypeError, ValueError, RuntimeError, IndexError):
        # It wants other arguments, or its weight has another layout
        return False
    if not isinstance(output, Tensor) or output.dtype != expected.dtype:
        return False
    if output.shape != expected.shape:
        return False
    tolerance = 1e-2 * expected.abs().max().item()
    return torch.allclose(output, expected, rtol=1e-2, atol=tolerance)


def linear_shape(module: Any) -> tuple[int, int]:
    """(d_in, d_out) of a linear or adapted layer, or of each expert of a stack."""
    if isinstance(module, (AdaptedLinear, ExpertStack)):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
