"""How much of a new text's gradient lies where an adapter can move, for one or several
bases.

    python tools/bench/energy.py --base MODEL ... --new law.jsonl [--documents 24] [--tokens
    160] [--rank 8]

Spans are chosen by the gradient of some documents and judged by that of as many others: the
share of its squared norm that lies in each span, as mean over the linear layers of every
tenth decoder layer. A span is what an update can be, with all its trained numbers free. It
is a hint of what is learned and no more: a few directions of large activations hold much of
the energy, and Adam evens them out.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from mora_ds import MoRAConfig, delta_weight
from mora_ds.adapters.inject import spec_of
from mora_ds.adapters.ops.mora import OperatorSpec, adjoint, operator_of
from mora_ds.common.errors import UserError
from mora_ds.data import load_corpus, load_tokenizer
from mora_ds.models.decoder_layers import find_decoder_layers
from mora_ds.models.load import load_model
from mora_ds.runtime import cli
from tools.bench.report import Numbers, Report, bench_parser

CONJUGATE_STEPS = 8


@dataclass
class Sums:
    """What one linear layer has seen of some documents."""

    gradient: Tensor
    """Of the summed loss by the weight, (d_out, d_in) fp64."""
    inputs: Tensor
    """Summed over tokens, (d_in,) fp64."""

    def add_inputs(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """A hook before the layer's forward pass."""
        self.inputs += arguments[0].detach().flatten(0, -2).sum(0)


NUMBERS: Numbers = {
    "documents": (24, "that choose, and as many others that judge"),
    "tokens": (160, "of each, from its start; shorter ones are left out"),
    "rank": (8, "LoRA's; MoRA matrices have about as many parameters"),
    "every": (10, "every how many decoder layers one is measured"),
}


def main() -> None:
    parser = bench_parser(__doc__, NUMBERS)
    parser.add_argument("--base", type=Path, nargs="+", required=True, help="model folders")
    parser.add_argument(
        "--new", type=Path, required=True, help="text that they are to learn, JSON lines"
    )
    options = parser.parse_args()
    result = Report(options)
    columns = [_shares_of(base, options) for base in options.base]
    result.say(
        f"share of the gradient's energy in each span, over the weights measured, rank {options.rank}: "
        f"{options.documents} documents chose the spans, as many others judge"
    )
    rows = [
        [span, *(f"{100 * fmean(shares[span]):.1f}%" for shares in columns)]
        for span in columns[0]
    ]
    result.show("mean", [["span, mean", *(base.name for base in options.base)], *rows])
    result.write()


def _shares_of(base: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """{span: the share that it holds in each measured weight of `base`}."""
    model = load_model(base, torch.float32, flag="--base").eval()
    layers = _measured_layers(model, options.every)
    rows = _rows(base, options)
    chosen = _sums(model, layers, rows[::2])
    judged = _sums(model, layers, rows[1::2])
    config = MoRAConfig(options.rank, operator="rotate", r_hat_multiple=1)
    shares: dict[str, list[float]] = {}
    for name, layer in layers.items():
        spec = operator_of(spec_of(config, name, layer, 0), name)
        for span, share in _shares(
            spec,
            layer.weight.detach().double(),
            chosen[name],
            judged[name].gradient,
            options.rank,
        ):
            shares.setdefault(span, []).append(share)
    return shares


def _measured_layers(model: Any, every: int) -> dict[str, nn.Linear]:
    decoder = list(find_decoder_layers(model).items())
    return {
        f"{prefix}.{name}": module
        for prefix, layer in decoder[every // 2 :: every]
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def _rows(base: Path, options: argparse.Namespace) -> list[Tensor]:
    """Token ids (1, T) of the first documents that are long enough."""
    tokenizer = load_tokenizer(base)
    rows: list[Tensor] = []
    for text in load_corpus([str(options.new)]).texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]
        if len(ids) == options.tokens:
            rows.append(torch.tensor([ids]))
        if len(rows) == 2 * options.documents:
            return rows
    raise UserError(
        f"--documents: {options.new} has {len(rows)} of at least {options.tokens} tokens"
    )


def _sums(model: Any, layers: dict[str, nn.Linear], rows: list[Tensor]) -> dict[str, Sums]:
    sums = {
        name: Sums(
            torch.zeros(layer.weight.shape).double(),
            torch.zeros(layer.in_features).double(),
        )
        for name, layer in layers.items()
    }

    hooks = [
        layer.register_forward_pre_hook(sums[name].add_inputs)
        for name, layer in layers.items()
    ]
    weights = {name: layer.weight for name, layer in layers.items()}
    for ids in rows:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
        for name, gradient in zip(
            weights, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            sums[name].gradient += gradient
    for hook in hooks:
        hook.remove()
    return sums


def _shares(
    spec: OperatorSpec, weight: Tensor, chosen: Sums, judged: Tensor, rank: int
) -> Iterator[tuple[str, float]]:
    """(span, share of `judged` in it) for one weight."""
    side = spec.r_hat
    total = judged.square().sum()

    def between(left: Tensor, right: Tensor) -> float:
        return float((left.T @ judged @ right).square().sum() / total)

    def of_inputs(right: Tensor) -> float:
        return float((judged @ right).square().sum() / total)

    yield "MoRA, rotate", float(_nearest_update(spec, judged).square().sum() / total)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    yield "M between the weight's leading sides", between(left[:, :side], right[:side].T)
    left, _, right = torch.linalg.svd(chosen.gradient, full_matrices=False)
    yield "M between the gradient's sides", between(left[:, :side], right[:side].T)
    drawn = torch.randn(
        len(judged.T), rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    yield "LoRA at its start", of_inputs(torch.linalg.qr(drawn)[0])
    yield "LoRA, A turned to the gradient", of_inputs(right[:rank].T)
    yield (
        "the mean input alone, as a bias",
        of_inputs(chosen.inputs[:, None] / chosen.inputs.norm()),
    )
    yield (
        "best of LoRA's rank",
        float(torch.linalg.svdvals(judged)[:rank].square().sum() / total),
    )


def _nearest_update(spec: OperatorSpec, gradient: Tensor) -> Tensor:
    """The update of this operator that is nearest to `gradient` (d_out, d_in), by conjugate
    gradients on M.

    The map from M to the weight has orthogonal columns but for groups that the sizes cut
    short, so few steps suffice.
    """
    square = torch.zeros_like(adjoint(spec, gradient))
    residual = adjoint(spec, gradient)
    direction = residual
    for _ in range(CONJUGATE_STEPS):
        if residual.norm() <= 1e-9 * gradient.norm():
            break
        curved = adjoint(spec, delta_weight(spec, direction))
        length = residual.square().sum() / (direction * curved).sum()
        square = square + length * direction
        smaller = residual - length * curved
        direction = smaller + smaller.square().sum() / residual.square().sum() * direction
        residual = smaller
    return delta_weight(spec, square)


if __name__ == "__main__":
    cli.run(main)
