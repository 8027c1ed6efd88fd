"""Workarounds that make DeepSpeed's Muon correct for MoRA matrices and LoRA's factors.
Written against DeepSpeed 0.19.8; tests/engine/test_muon_contract.py names each symbol
that an upgrade has moved.

    load_kernels       before deepspeed.initialize, for every optimizer: prevents compilation of kernels
    check_factors      rejects configs where LoRA's two factors would be orthogonalized as one matrix
    muon_groups        around deepspeed.initialize: chooses the parameters that use Muon
    repair_clipping    after deepspeed.initialize: clips the gradient instead of Muon's update

DeepSpeed itself is correct in this (tests/engine/test_muon.py): every update is
orthogonalized as an unsharded matrix, once per optimizer step, from the gradient summed
over micro-batches and ranks, and is equal on all ranks.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm
from torch import Tensor, nn

from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.common.attributes import replaced
from mora_ds.common.errors import UserError
from mora_ds.engine.ds_config import compute_dtype
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.zero import Engine, Stage3View, ZeroView, view_of


@contextmanager
def muon_groups(layers: Iterable[AdaptedLinear], has_factors: bool) -> Iterator[None]:
    """A context in which `deepspeed.initialize` uses Muon for the adapter weights of
    `layers`, and AdamW for other parameters. `has_factors`: whether an adapter weight
    is two matrices side by side.

    DeepSpeed decides by names (deepspeed/__init__.py, `set_optimizer_flags`): Muon for
    each matrix without "embed" or "lm_head" in its name. That would include GPT-2's
    embedding `wte`, and exclude a MoRA matrix in a module named `embed_in`, which would
    also split the parameter group of the MoRA matrices.
    """
    muon_specs = {id(layer.adapter_weight): layer.spec for layer in layers}
    tag_by_name = deepspeed.set_optimizer_flags

    def tag(config: Any, model: nn.Module) -> None:
        tag_by_name(config, model)
        for parameter in model.parameters():
            spec = muon_specs.get(id(parameter))
            parameter.use_muon = spec is not None  # type: ignore[attr-defined]
            # DeepSpeed passes it to `_per_head_orthogonalize`, which `load_kernels`
            # replaces
            columns = Columns(spec.d_in) if spec and has_factors else None
            parameter.muon_num_heads = columns  # type: ignore[attr-defined]

    with replaced(deepspeed, "set_optimizer_flags", tag):
        yield


def load_kernels() -> None:
    """Import runtime/zero/muon/original_muon.py without compiling its functions.

    DeepSpeed imports it for every engine (stage3.py, `__init__`), and decorating its
    functions takes a second, because torch loads its compiler. With Muon, compilation
    takes 19 s in the first step for two shapes of matrices on a CPU, and needs a C++
    compiler. Fifteen products of small matrices gain little from it.
    """
    with replaced(
        compiler, "compile", lambda *args, **kwargs: lambda function: function
    ):
        from deepspeed.runtime.zero.muon import muon_optimizer, original_muon
    original_muon._per_head_orthogonalize = _orthogonalize_factors
    # The decorator has already run if another engine was created before
    for module in (original_muon, muon_optimizer):
        for name in (
            "muon_update",
            "zeropower_via_newtonschulz5",
            "zeropower_via_gram_newtonschulz",
        ):
            if hasattr(module, name):
                setattr(module, name, inspect.unwrap(getattr(module, name)))


class Columns(int):
    """D, the number of columns of A, passed as DeepSpeed's number of attention heads."""


def _orthogonalize_factors(
    update: Tensor, d_in: int, steps: int, method: str
) -> Tensor:
    """Replaces original_muon.py's `_per_head_orthogonalize` for LoRA's [A | B^T]
    (r, D + O): orthogonalizes A (r, D) and B (O, r) separately, with Muon's factor for
    tall matrices."""
    from deepspeed.runtime.zero.muon import original_muon

    if not isinstance(d_in, Columns):
        raise RuntimeError(
            "Muon per attention head is not supported in a process that also has an engine of mora_ds"
        )
    kernels = {
        "gram": original_muon.zeropower_via_gram_newtonschulz,
        "standard": original_muon.zeropower_via_newtonschulz5,
    }
    factors = (update[:, :d_in], update[:, d_in:].mT)
    down, up = (
        kernels[method](factor, steps)
        * original_muon._aspect_ratio_scale(*factor.shape)
        for factor in factors
    )
    return torch.cat([down, up.mT], dim=1)


def check_factors(config: DsConfig) -> None:
    """Raise `UserError` if Muon would orthogonalize LoRA's two factors, which are one
    parameter, as one matrix: bf16_optimizer.py, `_prepare_muon_updates`, and
    stage_1_and_2.py, `get_flat_partition` of aligned parameters, do not pass the number
    of columns."""
    zero = config["zero_optimization"]
    if zero["stage"] == 1 and compute_dtype(config) == torch.bfloat16:
        raise UserError(
            "--optimizer muon with LoRA in bf16 needs ZeRO stage 2 or 3, and this is stage 1"
        )
    if zero.get("parameter_alignment"):
        raise UserError(
            "--optimizer muon with LoRA: leave zero_optimization.parameter_alignment out of the config"
        )


def repair_clipping(engine: Engine) -> None:
    """Clip the gradient before Muon.

    ZeRO's optimizers clip after Muon (stage3.py and stage_1_and_2.py, `step`). The Muon
    update of an M has a norm of about sqrt(r_hat), independent of the gradient. So
    `gradient_clipping` would scale down every update, by a factor that grows with the
    number of layers, and the logged norm would be that of the update. BF16_Optimizer
    has the correct order.

    fp16: the momentum would contain gradients times the changing loss scale; here Muon
    gets unscaled gradients. Stages 1 and 2: the momentum would have the gradient's
    dtype; here it is always fp32.
    """
    view = view_of(engine)
    if isinstance(view, Stage3View):
        _repair_stage_3(engine.optimizer, engine.gradient_clipping())
    elif isinstance(view, ZeroView):
        _repair_stages_1_and_2(engine.optimizer, engine.gradient_clipping())


def _repair_stage_3(optimizer: Any, limit: float) -> None:
    """Wrap methods that `step` calls: `_apply_muon_to_accumulated_grads`,
    `_get_norm_groups`."""
    orthogonalize = optimizer._apply_muon_to_accumulated_grads
    find_norms = optimizer._get_norm_groups
    norms: list[Any] = []

    def clip_and_orthogonalize() -> None:
        # Makes `unscale_and_clip_grads` only unscale
        optimizer.clip_grad = 0.0
        # Filled by the previous step; the gradients of this step are scaled
        optimizer.sub_groups_lacking_loss_scale.clear()
        norms[:] = find_norms()
        factor = clip_factor(norms, optimizer.loss_scale, limit)
        if factor is None:
            return
        for index, uses_muon in enumerate(optimizer.sub_groups_using_muon):
            scale = optimizer.loss_scale if uses_muon else 1.0
            _scale(optimizer.averaged_gradients[index], factor / scale)
        orthogonalize()

    optimizer._apply_muon_to_accumulated_grads = clip_and_orthogonalize
    optimizer._get_norm_groups = lambda: norms


def _repair_stages_1_and_2(optimizer: Any, limit: float) -> None:
    """`get_flat_partition` orthogonalizes during the backward pass, before the norm is
    known. Postpone that until `step` computes the norm."""
    flatten = optimizer.get_flat_partition
    find_norm = optimizer.scaled_global_norm
    postponed: dict[int, tuple[list[Tensor], Callable[[], list[Tensor]]]] = {}

    def postpone(
        tensors: list[nn.Parameter], *args: Any, param_group_idx: int, **kwargs: Any
    ) -> list[Tensor]:
        group = param_group_idx
        flatten_these = partial(
            flatten, tensors, *args, param_group_idx=group, **kwargs
        )
        if not (tensors and optimizer._is_muon_group(tensors)):
            return flatten_these()
        postponed[group] = (list(optimizer.all_grad_tensors[group]), flatten_these)
        for parameter in tensors:
            parameter.use_muon = False  # type: ignore[attr-defined]
        try:
            return flatten_these()
        finally:
            for parameter in tensors:
                parameter.use_muon = True  # type: ignore[attr-defined]

    def clip_and_orthogonalize(*args: Any, **kwargs: Any) -> Tensor:
        optimizer.clip_grad = 0.0
        optimizer.groups_lacking_loss_scale.clear()
        norm = find_norm(*args, **kwargs)
        factor = clip_factor([norm], optimizer.loss_scale, limit)
        if factor is not None:
            for index in range(len(optimizer.bit16_groups)):
                if index in postponed:
                    gradients, orthogonalize = postponed[index]
                    scale = factor / optimizer.loss_scale
                    scaled = [gradient.float() * scale for gradient in gradients]
                    optimizer.all_grad_tensors[index] = scaled
                    optimizer.averaged_gradients[index] = orthogonalize()
                    optimizer.all_grad_tensors[index] = None
                else:
                    _scale(optimizer.averaged_gradients[index], factor)
        postponed.clear()
        return norm

    optimizer.get_flat_partition = postpone
    optimizer.scaled_global_norm = clip_and_orthogonalize


def clip_factor(
    scaled_norms: list[Any], loss_scale: float, limit: float
) -> float | None:
    """The clipping factor for gradients with these norms, which include the loss scale.
    None if a norm is NaN or infinite: DeepSpeed skips such a step, and Muon's momentum
    must not include it."""
    norm = combine_grad_norm_groups(scaled_norms)
    if is_invalid_grad_norm(norm):
        return None
    return min(1.0, limit / (float(norm) / loss_scale + 1e-6)) if limit > 0 else 1.0


@torch.no_grad()
def _scale(gradients: Iterable[Tensor | None], factor: float) -> None:
    if factor == 1.0:
        return
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)
