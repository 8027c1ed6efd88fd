"""Time one layer, forward and backward, against the frozen layer alone: MoRA, LoRA,
full training.

    python tools/bench/layer.py [--shapes 1024x1024] [--seconds 1]

Every figure is the median of interleaved pairs (the frozen layer, then the case; output
and input gradient of both) in one process, so 1.00 is an adapter that costs nothing; in
one thread of a CPU, by the thread's own time, of which other processes take none.
`gpu.py layer` measures the same on a GPU, where MoRA, the product's own layer, takes
its kernels. LoRA, ours, PEFT's (`pip install -e '.[bench]'`) and one whose products are
fused, has as many parameters as M. `saved` is what autograd keeps from a forward, every
storage once, without weights: PEFT's LoRA, then MoRA's.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.adapters.layer import LoRALinear, MoRALinear
from mora_ds.adapters.ops.index_tables import mora_matrix_size, rope_table
from mora_ds.adapters.ops.linear import Compute, cheaper_path
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.common.tensor_files import dtype_name
from tools.bench.fused_lora import FusedLoRA
from tools.bench.measuring import clock, trained_parameters
from tools.bench.report import Report, bench_parser

PATHS = (Compute.ACTIVATION, Compute.WEIGHT)
Shape = tuple[int, int]
"""(d_in, d_out)"""
Operator = tuple[OperatorKind, int]
"""An operator, and the rank of the LoRA that has as many parameters as M."""
SHAPES: tuple[Shape, ...] = (
    (1024, 1024),
    (1024, 2752),
    (2752, 1024),
    (576, 576),
    (576, 1536),
    (1536, 576),
)
"""Llama 7B's layers, a quarter of each side, and SmolLM-135M's."""
TOKENS = (256, 2048)
DTYPES = (torch.float32, torch.bfloat16)
OPERATORS: tuple[Operator, ...] = ((OperatorKind.ROTATE, 8), (OperatorKind.SHARE, 64))
Step = Callable[[], Tensor]
"""One forward."""
Case = tuple[Step, Sequence[Tensor]]
"""A forward, and the tensors that it trains."""
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


def layers_of(
    shapes: Iterable[Shape],
    tokens: Iterable[int],
    operators: Iterable[Operator],
    **like: Any,
) -> Iterator[Layer]:
    """A layer for each shape, number of tokens and operator. `like`: dtype and
    device."""
    for (d_in, d_out), rows, (kind, rank) in product(shapes, tokens, operators):
        r_hat = min(mora_matrix_size(d_in, d_out, rank, kind), max(d_in, d_out))
        spec = OperatorSpec(kind, d_in, d_out, r_hat, Grouping.PERMUTED, seed=1)
        base = nn.Linear(d_in, d_out, bias=False, **like).requires_grad_(False)
        x = torch.randn(rows, d_in, **like).requires_grad_()
        yield Layer(spec, rank, x, torch.randn(rows, d_out, **like), base)


def cases_of(layer: Layer) -> dict[str, Case]:
    """What is compared on one layer."""
    x = layer.x
    weight = layer.base.weight
    spec = layer.spec
    mora_matrix = torch.zeros(spec.r_hat, spec.r_hat).to(x).requires_grad_()
    trained = weight.clone().requires_grad_()
    lora = LoRASpec(spec.d_in, spec.d_out, layer.rank, 2.0 * layer.rank)
    ours = LoRALinear(layer.base, lora)
    fused = FusedLoRA(layer.base, layer.rank)
    config = LoraConfig(r=layer.rank, lora_alpha=2 * layer.rank, target_modules=["0"])
    peft = inject_adapter_in_model(config, nn.Sequential(layer.base)).to(x.dtype)

    def reference() -> Tensor:
        return F.linear(x, weight) + reference_update(spec, mora_matrix, x)

    cases: dict[str, Case] = {
        "full": (lambda: F.linear(x, trained), [trained]),
        "our LoRA": (lambda: ours(x), [ours.adapter_weight]),
        "PEFT LoRA": (
            lambda: peft(x),
            trained_parameters(peft),
        ),
        "fused LoRA": (lambda: fused(x), [fused.a, fused.b]),
        "reference": (reference, [mora_matrix]),
    }
    for path in PATHS:
        mora = MoRALinear(layer.base, spec, 0.0, path)
        cases[path.value] = (lambda mora=mora: mora(x)), [mora.adapter_weight]  # type: ignore[misc]
    return cases


def reference_update(spec: OperatorSpec, mora_matrix: Tensor, x: Tensor) -> Tensor:
    """The update of x (tokens, d_in) by its formulas (paper, eq. 6-11), as the
    reference computes it: concatenations and reshapes of whole activations, one product
    per block. It knows no permutations."""
    missing = spec.blocks_in * spec.r_hat - spec.d_in
    blocks = torch.cat((x, x[:, :missing]), dim=-1).unflatten(-1, (-1, spec.r_hat))
    if spec.kind is OperatorKind.SHARE:
        y = F.linear(blocks.sum(dim=-2), mora_matrix)
    else:
        cos, sin = (
            torch.cat((half, half), dim=-1)
            for half in rope_table(spec.blocks_in, spec.r_hat, x.dtype, x.device)
        )
        first, second = blocks.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        y = F.linear(blocks * cos + turned * sin, mora_matrix).flatten(-2)
    if y.shape[-1] < spec.d_out:
        y = torch.cat([y] * -(-spec.d_out // y.shape[-1]), dim=-1)
    return y[:, : spec.d_out]


# -- measuring -------------------------------------------------------------------------


def row(layer: Layer, seconds: float) -> list[str]:
    """A row of the table of ratios to the frozen layer."""
    spec = layer.spec
    cases = cases_of(layer)
    measured = ratios(layer, cases, seconds)
    auto = cheaper_path(len(layer.x), spec.d_in, spec.d_out).value
    saved = [f"{saved_mib(layer, *cases[name]):.1f}" for name in ("PEFT LoRA", auto)]
    dtype = dtype_name(layer.x.dtype)
    return [
        f"{spec.d_in} x {spec.d_out}, {len(layer.x)}, {dtype}",
        f"{spec.kind.value} r={layer.rank}",
        f"{measured['frozen'] * 1e3:.1f}",
        *(f"{measured[name]:.2f}" for name in COLUMNS),
        f"{auto}: {measured[auto]:.2f}",
        ", ".join(saved),
    ]


def ratios(layer: Layer, cases: dict[str, Case], seconds: float) -> dict[str, float]:
    """The median of each case over interleaved pairs with the frozen layer; under
    "frozen" that layer's own median in seconds."""
    now = clock(layer.x.device)
    frozen_s: list[float] = []
    measured = {}
    for name, (step, trained) in cases.items():
        layer.backward(step, *trained)  # not counted
        case_s: list[float] = []
        started = now()
        while len(case_s) < 3 or now() - started < seconds:
            first = now()
            layer.backward(lambda: F.linear(layer.x, layer.base.weight))
            second = now()
            layer.backward(step, *trained)
            case_s.append((now() - second) / (second - first))
            frozen_s.append(second - first)
        measured[name] = median(case_s)
    return {"frozen": median(frozen_s), **measured}


def saved_mib(layer: Layer, step: Step, trained: Sequence[Tensor]) -> float:
    """What autograd keeps from a forward, without the weights."""
    weights = {tensor.data_ptr() for tensor in (layer.base.weight, *trained)}
    saved: dict[int, torch.UntypedStorage] = {}

    def see(tensor: Tensor) -> Tensor:
        # A storage that is referenced here stays alive, so that no address comes twice
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        step()
    return sum(saved[address].nbytes() for address in saved.keys() - weights) / 2**20


def main() -> None:
    at_least = (0.5, "at least so long, and three pairs, for each figure")
    parser = bench_parser(__doc__, {"seconds": at_least})
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=SHAPES, metavar="D_INxD_OUT"
    )
    options = parser.parse_args()
    report = Report(options)
    torch.set_num_threads(1)
    lines = [TITLES]
    for dtype in DTYPES:
        layers = layers_of(options.shapes, TOKENS, OPERATORS, dtype=dtype)
        lines += [row(layer, options.seconds) for layer in layers]
    report.say("CPU, 1 thread: ratios to the frozen layer alone")
    report.show("layers", lines)
    report.write()


def _shape(text: str) -> Shape:
    d_in, d_out = map(int, text.split("x"))
    return d_in, d_out


if __name__ == "__main__":
    main()
