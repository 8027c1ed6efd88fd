"""Liger's kernels in triton's interpreter (`TRITON_INTERPRET=1`), against transformers' own layers.

    python -m tests.helpers.fused FAMILY ...

Losses and gradients of MoRA matrices, and that no kernel stands where it would pass them over or change the loss.
In a process of its own, as triton decides at its import whether it interprets. Exits with the first difference.
"""

from __future__ import annotations

import sys
from typing import Any

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from mora_ds.adapters.inject import mora_layers
from mora_ds.train.liger import use_liger
from tests.helpers.models import MIXTURES, adapted_model, causal_loss, tokens


@triton.jit  # type: ignore[untyped-decorator]
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(x)


@triton.jit  # type: ignore[untyped-decorator]
def _tanh(x):  # type: ignore[no-untyped-def]
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


def prepare() -> None:
    """What triton 3.9's interpreter lacks for these kernels: numbers as arguments, and libdevice."""
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1"
    convert = interpreter._implicit_cvt

    def with_numbers(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = with_numbers
    liger_kernel.ops.rms_norm.rsqrt, liger_kernel.ops.geglu.tanh = _rsqrt, _tanh


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = causal_loss(model, tokens(2).to(model.device))
    names, layers = zip(*mora_layers(model).items(), strict=True)
    gradients = torch.autograd.grad(loss, [layer.square for layer in layers])
    return loss.item(), dict(zip(names, gradients, strict=True))


def check_family(family: str, device: str = "cpu") -> None:
    has_experts = family in MIXTURES
    targets = ("all-linear", "experts") if has_experts else ("all-linear",)
    model = adapted_model(family, target_modules=targets).to(device)
    forward = model.forward
    loss, gradients = loss_and_gradients(model)
    use_liger(model)
    bound = {name: vars(module).get("forward") for name, module in model.named_modules()}
    fused = {name for name, method in bound.items() if getattr(method, "__module__", "").startswith("liger_kernel")}
    assert sum("norm" in name for name in fused) > 2, fused
    assert any("mlp" in name for name in fused) is not has_experts, fused
    assert model.forward == forward, "the loss is not ours"
    again, others = loss_and_gradients(model)
    assert abs(again - loss) < 1e-6 * loss, (again, loss)
    assert loss_and_gradients(model)[0] == again
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


if __name__ == "__main__":
    prepare()
    for each in sys.argv[1:]:
        check_family(each)
        print(each, flush=True)
