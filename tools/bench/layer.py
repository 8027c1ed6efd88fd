"""Time one layer, forward and backward, against the frozen layer alone: MoRA, LoRA, full
training.

    python tools/bench/layer.py [--dtypes float32] [--shapes 1024x1024] [--tokens 256 2048]
    [--threads 1] [--seconds 1]

Every figure is the median of interleaved pairs (the frozen layer, then the case; output and
input gradient of both) in one process, so 1.00 is an adapter that costs nothing; in one
thread of a CPU by the thread's own time, of which other processes take none. LoRA, ours,
PEFT's (`pip install -e '.[bench]'`) and one whose products are fused, has as many
parameters as M. MoRA is the product's own layer, with its kernels on a GPU. `saved` is what
autograd keeps from a forward, every storage once, without weights: PEFT's LoRA, then
MoRA's.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.adapters.layer import LoRALinear, MoRALinear
from mora_ds.adapters.ops.index_tables import rope_table, square_size
from mora_ds.adapters.ops.linear import Compute, cheaper_path
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from tools.bench.fused_lora import FusedLoRA
from tools.bench.measuring import clock, saved_activations
from tools.bench.report import Report, bench_parser

PATHS = (Compute.ACTIVATION, Compute.WEIGHT)
CASES = ((OperatorKind.ROTATE, 8), (OperatorKind.SHARE, 64))
SHAPES = ("1024x1024", "1024x2752", "2752x1024", "576x576", "576x1536", "1536x576")
"""Llama 7B's layers, a quarter of each side, and SmolLM-135M's."""
Step = Callable[[], Tensor]
"""One forward."""


@dataclass(frozen=True)
class Layer:
    """One layer's tensors."""

    spec: OperatorSpec
    rank: int
    x: Tensor
    g: Tensor
    base: nn.Linear

    def backward(self, step: Step, *leaves: Tensor) -> None:
        torch.autograd.grad(step(), (self.x, *leaves), self.g)


def make(
    kind: OperatorKind, rank: int, shape: tuple[int, int], tokens: int, like: dict[str, Any]
) -> Layer:
    d_in, d_out = shape
    r_hat = min(square_size(d_in, d_out, rank, kind), max(shape))
    spec = OperatorSpec(kind, d_in, d_out, r_hat, Grouping.PERMUTED, seed=1)
    base = nn.Linear(d_in, d_out, bias=False, **like).requires_grad_(False)
    return Layer(
        spec,
        rank,
        torch.randn(tokens, d_in, **like).requires_grad_(),
        torch.randn(tokens, d_out, **like),
        base,
    )


def forwards(layer: Layer) -> dict[str, tuple[Step, list[Tensor]]]:
    """Name -> (forward, what it trains)."""
    x = layer.x
    weight = layer.base.weight
    spec = layer.spec
    square = torch.zeros(
        spec.r_hat, spec.r_hat, dtype=x.dtype, device=x.device
    ).requires_grad_()
    trained = weight.clone().requires_grad_()
    ours = LoRALinear(
        layer.base, LoRASpec(spec.d_in, spec.d_out, layer.rank, 2.0 * layer.rank)
    )
    fused = FusedLoRA(layer.base, layer.rank)
    peft = peft_lora(layer)
    cases: dict[str, tuple[Step, list[Tensor]]] = {
        "frozen": (lambda: F.linear(x, weight), []),
        "full": (lambda: F.linear(x, trained), [trained]),
        "our LoRA": (lambda: ours(x), [ours.value]),
        "PEFT LoRA": (lambda: peft(x), [p for p in peft.parameters() if p.requires_grad]),
        "fused LoRA": (lambda: fused(x), [fused.a, fused.b]),
        "reference": (
            lambda: F.linear(x, weight) + reference_update(spec, square, x),
            [square],
        ),
    }
    for path in PATHS:
        mora = MoRALinear(layer.base, spec, 0.0, path)
        cases[path.value] = (lambda mora=mora: mora(x)), [mora.value]  # type: ignore[misc]
    return cases


def peft_lora(layer: Layer) -> nn.Module:
    """PEFT's LoRA on the same frozen weight."""
    config = LoraConfig(r=layer.rank, lora_alpha=2 * layer.rank, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(layer.base))
    return model.to(layer.x.dtype)


def reference_update(spec: OperatorSpec, square: Tensor, x: Tensor) -> Tensor:
    """The update by its formulas (paper, eq. 6-11), as the reference computes it:
    concatenations and reshapes of whole activations, one product per block. It knows no
    permutations."""
    size = spec.blocks_in * spec.r_hat
    blocks = torch.cat((x, x[..., : size - spec.d_in]), dim=-1).view(
        *x.shape[:-1], spec.blocks_in, spec.r_hat
    )
    if spec.kind is OperatorKind.SHARE:
        y = F.linear(blocks.sum(dim=-2), square)
        return y.repeat(*[1] * (y.dim() - 1), spec.blocks_out)[..., : spec.d_out]
    cos, sin = (
        torch.cat((half, half), dim=-1)
        for half in rope_table(spec.blocks_in, spec.r_hat, x.dtype, x.device)
    )
    turned = torch.cat(
        (-blocks[..., spec.r_hat // 2 :], blocks[..., : spec.r_hat // 2]), dim=-1
    )
    y = F.linear(blocks * cos + turned * sin, square).flatten(-2)
    return (
        y[..., : spec.d_out]
        if size >= spec.d_out
        else torch.cat([y] * spec.blocks_out, dim=-1)[..., : spec.d_out]
    )


# -- measuring --------------------------------------------------------------------------------------------------------


def ratios(
    layer: Layer,
    cases: dict[str, tuple[Step, list[Tensor]]],
    now: Callable[[], float],
    seconds: float,
) -> dict[str, float]:
    """Medians over interleaved pairs; under "frozen" its own median in seconds."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    frozen = cases["frozen"][0]
    for name, (step, trained) in cases.items():
        layer.backward(step, *trained)  # not counted
        started = now()
        while len(times[name]) < 3 or now() - started < seconds:
            first = now()
            layer.backward(frozen)
            second = now()
            layer.backward(step, *trained)
            base = second - first
            times[name].append(base if name == "frozen" else (now() - second) / base)
    return {name: statistics.median(measured) for name, measured in times.items()}


def saved_mib(layer: Layer, step: Step, trained: list[Tensor]) -> float:
    with saved_activations(layer.base.weight, *trained) as saved:
        assert step().requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / 2**20


COLUMNS = (
    "full",
    "PEFT LoRA",
    "fused LoRA",
    "our LoRA",
    "reference",
    *(path.value for path in PATHS),
)
TITLES = [
    "d_in x d_out, tokens, dtype",
    "operator",
    "frozen, ms",
    *COLUMNS,
    "auto",
    "saved, MiB: PEFT LoRA, auto",
]


def row(layer: Layer, now: Callable[[], float], seconds: float) -> list[str]:
    """A row of the table of ratios to the frozen layer."""
    cases = forwards(layer)
    spec = layer.spec
    dtype = str(layer.x.dtype).removeprefix("torch.")
    measured = ratios(layer, cases, now, seconds)
    figures = [f"{measured[name]:.2f}" for name in COLUMNS]
    auto = cheaper_path(len(layer.x), spec.d_in, spec.d_out).value
    saved = [f"{saved_mib(layer, *cases[name]):.1f}" for name in ("PEFT LoRA", auto)]
    return [
        f"{spec.d_in} x {spec.d_out}, {len(layer.x)}, {dtype}", f"{spec.kind.value} r={layer.rank}",
        f"{measured['frozen'] * 1e3:.1f}", *figures, f"{auto}: {measured[auto]:.2f}", ", ".join(saved),
    ]  # fmt: skip


def main() -> None:
    numbers = {
        "threads": (1, "of a CPU"),
        "seconds": (0.5, "at least so long, and three pairs, for each figure"),
    }
    parser = bench_parser(__doc__, numbers)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="D_INxD_OUT")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 2048])
    parser.add_argument(
        "--operators", nargs="+", default=[f"{kind.value}:{rank}" for kind, rank in CASES]
    )
    options = parser.parse_args()
    report = Report(options)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    now = clock(device)
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {options.threads} thread(s)"
    )
    rows = [TITLES]
    for dtype in options.dtypes:
        layers = layers_of(options, {"dtype": getattr(torch, dtype), "device": device})
        rows += [row(layer, now, options.seconds) for layer in layers]
    report.say(f"{name}: ratios to the frozen layer alone")
    report.show("layers", rows)
    report.write()


def layers_of(options: argparse.Namespace, like: dict[str, Any]) -> Iterator[Layer]:
    """A layer for each shape, number of tokens and operator."""
    for shape in options.shapes:
        for tokens in options.tokens:
            for operator in options.operators:
                kind, rank = operator.split(":")
                d_in, d_out = (int(side) for side in shape.split("x"))
                yield make(OperatorKind(kind), int(rank), (d_in, d_out), tokens, like)


if __name__ == "__main__":
    main()
