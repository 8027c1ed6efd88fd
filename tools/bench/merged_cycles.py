"""What merged cycles cost a step on a base in 4 bits, where they act through their matrices.

    python tools/bench/merged_cycles.py [--cycles 0 1 2 4 8] [--tokens 512 2048] [--dtypes float32 bfloat16]

Forward and backward of one decoder layer's linear layers with the sides of a small Llama, over both paths. A figure is
the median of interleaved pairs (the dense base with the same adapter and path, then the case) in one process: 1.00 is a
base in 4 bits that costs nothing. `8 bits` is a base in 8 bits, which takes merges up. `bytes` is what the frozen
weights and the merged cycles hold together, as a share of the frozen weights in bf16. A table before these has what
rounding costs a weight of normal numbers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.adapters.config import AdapterConfig, LoRAConfig, MoRAConfig
from mora_ds.adapters.layer import AdaptedLinear, adapt
from mora_ds.adapters.nf4 import check_installed
from mora_ds.adapters.ops.linear import Compute
from mora_ds.runtime import cli
from tools.bench.measuring import clock
from tools.bench.report import Report, json_flag

ADAPTERS: dict[str, AdapterConfig] = {
    "rotate r=8": MoRAConfig(rank=8, operator="rotate"),
    "share r=64": MoRAConfig(rank=64, operator="share"),
    "share r=64, alternate": MoRAConfig(rank=64, operator="share", grouping="alternate"),
    "LoRA r=64": LoRAConfig(rank=64),
}


@dataclass(frozen=True)
class Case:
    """The adapted layers of one decoder layer."""

    layers: tuple[AdaptedLinear, ...]
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    def step(self) -> None:
        for layer, x, g in zip(self.layers, self.inputs, self.gradients, strict=True):
            torch.autograd.grad(layer(x), (x, layer.value), g)

    @property
    def nbytes(self) -> int:
        """Of the frozen weights, scales and merged cycles."""
        return sum(
            tensor.nbytes
            for layer in self.layers
            for tensor in (*layer.buffers(recurse=False), *(value for _, value in layer.merged))
        )


def make(
    config: AdapterConfig, path: Compute, bits: int, cycles: int, tokens: int, options: argparse.Namespace
) -> Case:
    """`cycles` merged, of random matrices, and one that is trained."""
    like: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "device": options.device}
    width, mlp = options.width, options.mlp
    sides = [(width, width), (width, width // 3), (width, width // 3), (width, width)]
    sides += [(width, mlp), (width, mlp), (mlp, width)]
    generator = torch.Generator(options.device).manual_seed(0)
    layers = []
    for index, (d_in, d_out) in enumerate(sides):
        name = f"layer-{index}"
        base = nn.Linear(d_in, d_out, bias=False, **like).requires_grad_(False)
        layer = adapt(base, config.operator_for(name, d_in, d_out, cycles), 0.0, path, seed=index)
        if bits != 16:
            layer.quantize(layer.weight, bits)
        specs = [config.operator_for(name, d_in, d_out, cycle) for cycle in range(cycles if bits == 4 else 0)]
        layer.keep_merged(
            (spec, 1e-3 * torch.randn(spec.value_shape, generator=generator, device=options.device)) for spec in specs
        )
        layers.append(layer)
    return Case(
        tuple(layers),
        tuple(torch.randn(1, tokens, d_in, **like).requires_grad_() for d_in, _ in sides),
        tuple(torch.randn(1, tokens, d_out, **like) for _, d_out in sides),
    )


def ratios(dense: Case, cases: Sequence[Case], now: Callable[[], float], rounds: int) -> list[float]:
    """Times of the cases as multiples of the dense base's: medians of pairs, in turn."""
    found: list[list[float]] = [[] for _ in cases]
    for case in (dense, *cases):
        case.step()  # makes tables
    for _ in range(rounds):
        for case, times in zip(cases, found, strict=True):
            started = now()
            dense.step()
            middle = now()
            case.step()
            times.append((now() - middle) / (middle - started))
    return [statistics.median(times) for times in found]


def table(options: argparse.Namespace, tokens: int) -> list[list[str]]:
    now = clock(torch.device(options.device))
    rows = [["adapter", "path", "8 bits", *(f"4 bits, {cycles} merged" for cycles in options.cycles), "bytes"]]
    for name in options.adapters:
        config = ADAPTERS[name]
        for path in (Compute.ACTIVATION, Compute.WEIGHT) if isinstance(config, MoRAConfig) else (Compute.ACTIVATION,):
            few = [make(config, path, 4, cycles, tokens, options) for cycles in options.cycles]
            dense, eight = (make(config, path, bits, 0, tokens, options) for bits in (16, 8))
            found = ratios(dense, [eight, *few], now, options.rounds)
            bf16 = dense.nbytes * torch.bfloat16.itemsize / getattr(torch, options.dtype).itemsize
            shares = f"{few[0].nbytes / bf16:.2f} to {few[-1].nbytes / bf16:.2f}"
            rows.append([name, path.value, *(f"{ratio:.2f}" for ratio in found), shares])
    return rows


def rounding(options: argparse.Namespace) -> list[list[str]]:
    """What 8 and 4 bits round off a weight of normal numbers, as a share of its norm."""
    base = nn.Linear(options.width, options.mlp, bias=False, device=options.device).requires_grad_(False)
    original = nn.init.normal_(base.weight, generator=torch.Generator(options.device).manual_seed(0)).clone()
    rows = [["bits", "rounding / norm"]]
    for bits in (8, 4):
        layer = adapt(
            base, LoRAConfig(rank=1).operator_for("layer", options.width, options.mlp, 0), 0.0, Compute.AUTO, 0
        )
        layer.quantize(original, bits)
        rows.append([str(bits), f"{((layer.read() - original).norm() / original.norm()).item():.1%}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", nargs="+", type=int, default=[0, 1, 2, 4, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS), metavar="NAME")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--mlp", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=9, help="pairs for each figure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    json_flag(parser)
    options = parser.parse_args()
    check_installed()
    torch.set_num_threads(options.threads)
    report = Report(options)
    report.show("rounding", rounding(options))
    for dtype in options.dtypes:
        options.dtype = dtype
        for tokens in options.tokens:
            title = f"{dtype}, {tokens} tokens"
            report.say(f"{title}: multiples of the time on a dense base")
            report.show(title, table(options, tokens))
    report.write()


if __name__ == "__main__":
    cli.run(main)
