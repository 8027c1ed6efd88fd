"""Attention sinks on top of fused kernels that do not know them (GPT-OSS).

A sink s is one more score of each query, which takes weight and gives nothing:

    lse' = log(exp(lse) + exp(s))        out' = exp(lse - lse') out        ds = - sum exp(s - lse') (g . out')

A fused backward pass forms the weights again as exp(score - lse) and subtracts g . out, where g is the gradient of out.
Given lse' and out' it returns the gradients of query, key and value under the sink.

Of a kernel's methods `forward` returns the output, lse in fp32, and what else backward needs; `backward` takes query,
key, value and then all of that, and returns their gradients; `heads_first` puts the dimensions of lse before the head's
size, and is its own inverse.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class CPUKernel:
    """torch's flash attention on the CPU (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): (n, H, C, D), sums
    (n, H, C); grouped key-value heads are not repeated."""

    seen: Tensor | None
    """(C, K) true where a query sees a key; None for causal attention."""
    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, ...]:
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, self.seen is None, attn_mask=self._bias(query), scale=self.scale
        )
        return out, sums

    def backward(self, grad: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *saved, 0.0, self.seen is None, attn_mask=self._bias(grad), scale=self.scale
        )
        return gradients

    def heads_first(self, out: Tensor) -> Tensor:
        return out

    def _bias(self, like: Tensor) -> Tensor | None:
        if self.seen is None:
            return None
        return like.new_zeros(self.seen.shape).masked_fill(~self.seen, float("-inf"))


@dataclass(frozen=True)
class VarlenKernel:
    """torch's flash attention on CUDA over documents (aten/src/ATen/native/native_functions.yaml,
    `_flash_attention_forward`, which `torch.nn.attention.varlen` wraps in another way in every version of torch):
    (N, H, D), sums (H, N); grouped key-value heads are not repeated. `forward` is differentiable by itself."""

    bounds: Tensor
    """(documents + 1,) int32."""
    longest: int
    left: int
    """Keys before its own that a query sees; -1 for all."""
    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, ...]:
        out, sums, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *self._documents, return_debug_mask=False, **self._weights
        )
        return out, sums

    def backward(self, grad: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = grad.new_zeros(2, dtype=torch.uint64), grad.new_empty(0)  # of dropout, as torch's varlen.py gives it
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, *saved, *self._documents, *state, **self._weights
        )
        return gradients

    def heads_first(self, out: Tensor) -> Tensor:
        return out.transpose(0, 1)

    @property
    def _documents(self) -> tuple[Any, ...]:
        """Of queries and of keys; no dropout; whether a query sees all that comes before it."""
        return self.bounds, self.bounds, self.longest, self.longest, 0.0, self.left < 0

    @property
    def _weights(self) -> dict[str, Any]:
        return {"scale": self.scale, "window_size_left": self.left, "window_size_right": 0}


Kernel = CPUKernel | VarlenKernel


def attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    kernel: Kernel,
) -> Tensor:
    """`kernel`'s attention with the sinks (H,); shapes are the kernel's."""
    out: Tensor = _WithSinks.apply(query, key, value, sinks, kernel)
    return out


class _WithSinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        kernel: Kernel,
    ) -> Tensor:
        out, sums, *state = kernel.forward(query, key, value)
        with_sink = torch.logaddexp(sums, sinks.float()[:, None])
        share = torch.exp(sums - with_sink).unsqueeze(-1)
        out = kernel.heads_first((kernel.heads_first(out) * share).to(out.dtype)).contiguous()
        ctx.save_for_backward(query, key, value, out, with_sink, *state, sinks)
        ctx.kernel = kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, sinks = ctx.saved_tensors
        kernel = ctx.kernel
        _, _, _, out, with_sink, *_ = saved
        gradients = kernel.backward(grad.contiguous(), *saved)
        sink_gradient = None
        if ctx.needs_input_grad[3]:
            taken = torch.exp(sinks.float()[:, None] - with_sink)
            taken = taken * kernel.heads_first(grad.float() * out.float()).sum(-1)
            sink_gradient = -taken.movedim(-2, 0).flatten(1).sum(1).to(sinks.dtype)
        return (*gradients, sink_gradient, None)
