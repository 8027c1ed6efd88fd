"""What DeepSpeed's Muon needs to be right for MoRA matrices and LoRA's factors. Written
against DeepSpeed 0.19.8; tests/engine/test_muon_contract.py names each symbol that an
upgrade has moved.

    load_kernels       before deepspeed.initialize, for every optimizer: no kernel is compiled
    check_factors      whether a config's optimizer lets each factor of LoRA be orthogonalised by itself
    preparing          around deepspeed.initialize: chooses the parameters that get Muon
    repair_clipping    after it: the gradient is clipped, not the update that Muon makes of it

What DeepSpeed does right (tests/engine/test_muon.py): every update is orthogonalised as
an unsharded matrix, once an optimizer step, from the gradient summed over micro-batches
and processes, and is the same on every process.
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
from mora_ds.common.errors import UserError
from mora_ds.engine import ds_optimizer
from mora_ds.engine.ds_config import compute_dtype
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.zero import Engine, Stage3View, ZeroView, view_of


@contextmanager
def preparing(layers: Iterable[AdaptedLinear], has_factors: bool) -> Iterator[None]:
    """Within, `deepspeed.initialize` gives Muon to the values of `layers`, else AdamW.
    `has_factors`: whether a value is two matrices side by side.

    DeepSpeed goes by names (deepspeed/__init__.py, `set_optimizer_flags`): each matrix
    without "embed" or "lm_head" in its name gets Muon. So would GPT-2's embedding
    `wte`, while a MoRA matrix in a module called `embed_in` would not, which would also
    split the parameter group of the MoRA matrices.
    """
    ours = {id(layer.value): layer.spec for layer in layers}
    tag_by_name = deepspeed.set_optimizer_flags

    def tag(config: Any, model: nn.Module) -> None:
        tag_by_name(config, model)
        for parameter in model.parameters():
            spec = ours.get(id(parameter))
            parameter.use_muon = spec is not None  # type: ignore[attr-defined]
            # DeepSpeed hands it on to `_per_head_orthogonalize`, which is ours
            # (`load_kernels`)
            columns = Columns(spec.d_in) if spec and has_factors else None
            parameter.muon_num_heads = columns  # type: ignore[attr-defined]

    deepspeed.set_optimizer_flags = tag
    try:
        yield
    finally:
        deepspeed.set_optimizer_flags = tag_by_name


def load_kernels() -> None:
    """Import runtime/zero/muon/original_muon.py with its functions uncompiled.

    DeepSpeed imports it for every engine (stage3.py, `__init__`), and to decorate a
    function takes a second: torch loads its compiler. With Muon, compiling takes 19 s
    at the first step for two shapes of matrices on a CPU, and needs a C++ compiler;
    fifteen products of small matrices gain little from it.
    """
    decorator = compiler.compile
    compiler.compile = lambda *args, **kwargs: lambda function: function
    try:
        from deepspeed.runtime.zero.muon import muon_optimizer, original_muon
    finally:
        compiler.compile = decorator
    original_muon._per_head_orthogonalize = _orthogonalise_factors
    # The decorator has run already where an engine that is not ours was made before
    for module in (original_muon, muon_optimizer):
        for name in (
            "muon_update",
            "zeropower_via_newtonschulz5",
            "zeropower_via_gram_newtonschulz",
        ):
            if hasattr(module, name):
                setattr(module, name, inspect.unwrap(getattr(module, name)))


class Columns(int):
    """D, the columns of A, in the place where DeepSpeed has an attention's heads."""


def _orthogonalise_factors(
    update: Tensor, d_in: int, steps: int, method: str
) -> Tensor:
    """In place of original_muon.py's `_per_head_orthogonalize`, for LoRA's [A | B^T]
    (r, D + O): A (r, D) and B (O, r) each as a matrix of its own, with the factor that
    Muon has for tall ones."""
    from deepspeed.runtime.zero.muon import original_muon

    if not isinstance(d_in, Columns):
        raise RuntimeError(
            "Muon by attention heads, in an engine beside one of mora_ds in the same process"
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
    """Raise `UserError` where Muon would take LoRA's factors, which are one parameter,
    for one matrix: bf16_optimizer.py, `_prepare_muon_updates`, and stage_1_and_2.py,
    `get_flat_partition` of aligned parameters, call it without the number of
    columns."""
    if not ds_optimizer.uses_muon(config):
        return
    zero = config["zero_optimization"]
    if zero["stage"] == 1 and compute_dtype(config) == "bfloat16":
        raise UserError(
            "--optimizer muon with LoRA in bf16 needs ZeRO stage 2 or 3, and this is stage 1"
        )
    if zero.get("parameter_alignment"):
        raise UserError(
            "--optimizer muon with LoRA: leave zero_optimization.parameter_alignment out of the config"
        )


def repair_clipping(engine: Engine) -> None:
    """Clip the gradient before Muon.

    The optimizers of ZeRO run Muon first and clip then (stage3.py and stage_1_and_2.py,
    `step`): the Muon update of an M has a norm of about sqrt(r_hat) whatever the
    gradient was, so `gradient_clipping` would scale every update down, by a factor that
    grows with the number of layers, and the norm that is logged would be the update's.
    In BF16_Optimizer the order is right.

    fp16: the momentum would be that of gradients times the loss scale, whatever that is
    at the time; here Muon gets them unscaled. Stages 1 and 2: the momentum follows the
    gradient's dtype, here always fp32.
    """
    view = view_of(engine)
    if isinstance(view, Stage3View):
        _repair_stage_3(engine.optimizer, engine.gradient_clipping())
    elif isinstance(view, ZeroView):
        _repair_stages_1_and_2(engine.optimizer, engine.gradient_clipping())


def _repair_stage_3(optimizer: Any, limit: float) -> None:
    """Wrap what `step` calls: `_apply_muon_to_accumulated_grads`,
    `_get_norm_groups`."""
    orthogonalise = optimizer._apply_muon_to_accumulated_grads
    find_norms = optimizer._get_norm_groups
    norms: list[Any] = []

    def clip_and_orthogonalise() -> None:
        # With it `unscale_and_clip_grads` only unscales
        optimizer.clip_grad = 0.0
        # Filled by the step before; the gradients of this one are scaled
        optimizer.sub_groups_lacking_loss_scale.clear()
        norms[:] = find_norms()
        factor = clip_factor(norms, optimizer.loss_scale, limit)
        if factor is None:
            return
        for index, uses_muon in enumerate(optimizer.sub_groups_using_muon):
            scale = optimizer.loss_scale if uses_muon else 1.0
            _scale(optimizer.averaged_gradients[index], factor / scale)
        orthogonalise()

    optimizer._apply_muon_to_accumulated_grads = clip_and_orthogonalise
    optimizer._get_norm_groups = lambda: norms


def _repair_stages_1_and_2(optimizer: Any, limit: float) -> None:
    """`get_flat_partition` orthogonalises during the backward pass, before any norm is
    known: postpone that until `step` asks for the norm."""
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

    def clip_and_orthogonalise(*args: Any, **kwargs: Any) -> Tensor:
        optimizer.clip_grad = 0.0
        optimizer.groups_lacking_loss_scale.clear()
        norm = find_norm(*args, **kwargs)
        factor = clip_factor([norm], optimizer.loss_scale, limit)
        if factor is not None:
            for index in range(len(optimizer.bit16_groups)):
                if index in postponed:
                    gradients, orthogonalise = postponed[index]
                    scale = factor / optimizer.loss_scale
                    scaled = [gradient.float() * scale for gradient in gradients]
                    optimizer.all_grad_tensors[index] = scaled
                    optimizer.averaged_gradients[index] = orthogonalise()
                    optimizer.all_grad_tensors[index] = None
                else:
                    _scale(optimizer.averaged_gradients[index], factor)
        postponed.clear()
        return norm

    optimizer.get_flat_partition = postpone
    optimizer.scaled_global_norm = clip_and_orthogonalise


def clip_factor(
    scaled_norms: list[Any], loss_scale: float, limit: float
) -> float | None:
    """The factor that clips gradients of these norms, which are still scaled by the
    loss scale. None where a norm is NaN or infinite: DeepSpeed drops such a step, and
    Muon's momentum must not take it in."""
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
