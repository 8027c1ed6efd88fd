"""How much of a new text's gradient lies where an adapter can move, for one or several
bases.

    python tools/bench/energy.py --base MODEL ... --new law.jsonl [--documents 24] [--tokens
    160] [--rank 8]

Spans are chosen by the gradient of some documents and judged by that of as many others:
the share of its squared norm that lies in each span, as mean over the linear layers of
every tenth decoder layer. A span is what an update can be, with all its trained numbers
free. It is a hint of what is learned and no more: a few directions of large activations
hold much of the energy, and Adam evens them out.
"""

import argparse
import sys
from functools import partial
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
from tools.bench.report import Report, bench_parser

CONJUGATE_STEPS = 8


def main() -> None:
    defaults = {
        "documents": (24, "that choose, and as many others that judge"),
        "tokens": (160, "of each, from its start; shorter ones are left out"),
        "rank": (8, "LoRA's; MoRA matrices have about as many parameters"),
        "every": (10, "every how many decoder layers one is measured"),
    }
    parser = bench_parser(__doc__, defaults)
    parser.add_argument(
        "--base", type=Path, nargs="+", required=True, help="model folders"
    )
    parser.add_argument(
        "--new",
        type=Path,
        required=True,
        help="text that the models are to learn, JSON lines",
    )
    options = parser.parse_args()
    report = Report(options)
    columns = [_mean_shares(base, options) for base in options.base]
    report.say(
        f"share of the gradient's energy in each span, over the weights measured, rank {options.rank}: "
        f"{options.documents} documents chose the spans, as many others judge"
    )
    rows = [["span, mean", *(base.name for base in options.base)]]
    for span in columns[0]:
        rows.append([span, *(f"{100 * shares[span]:.1f}%" for shares in columns)])
    report.show("mean", rows)
    report.write()


def _mean_shares(base: Path, options: argparse.Namespace) -> dict[str, float]:
    """{span: the share that it holds, as mean over the measured weights of `base`}."""
    model = load_model(base, torch.float32, flag="--base").eval()
    layers = _measured_layers(model, options.every)
    rows = _rows(base, options)
    chosen, inputs = _sums(model, layers, rows[::2])
    judged, _ = _sums(model, layers, rows[1::2])
    config = MoRAConfig(options.rank, operator="rotate", r_hat_multiple=1)
    of_layers = []
    for name, layer in layers.items():
        spec = operator_of(spec_of(config, name, layer), name)
        weight = layer.weight.detach().double()
        of_layers.append(
            _shares(
                spec, weight, chosen[name], inputs[name], judged[name], options.rank
            )
        )
    return {span: fmean(shares[span] for shares in of_layers) for span in of_layers[0]}


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


def _sums(
    model: Any, layers: dict[str, Any], rows: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of the loss by each layer's weight (d_out, d_in) and the layer's
    inputs (d_in,), both in fp64 and summed over the tokens of `rows`."""
    inputs = {
        name: torch.zeros(layer.in_features).double() for name, layer in layers.items()
    }

    def add_inputs(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[name] += arguments[0].detach().flatten(0, -2).sum(0)

    model.requires_grad_(False)
    hooks = []
    for name, layer in layers.items():
        layer.weight.requires_grad_()
        hooks.append(layer.register_forward_pre_hook(partial(add_inputs, name)))
    for ids in rows:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: layer.weight.grad.double() for name, layer in layers.items()}
    model.zero_grad()
    return gradients, inputs


def _shares(
    spec: OperatorSpec,
    weight: Tensor,
    chosen: Tensor,
    inputs: Tensor,
    judged: Tensor,
    rank: int,
) -> dict[str, float]:
    """{span: share of the gradient `judged` in it} for one weight. `chosen` and
    `inputs`: the gradient and the inputs of the documents that choose the spans."""
    side = spec.r_hat

    def share_of(inside: Tensor) -> float:
        return float(inside.square().sum() / judged.square().sum())

    of_weight, _, to_weight = torch.linalg.svd(weight, full_matrices=False)
    left, _, right = torch.linalg.svd(chosen, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(judged.T), rank, generator=generator, dtype=torch.float64)
    mean_input = inputs / inputs.norm()
    best = torch.linalg.svdvals(judged)[:rank]
    return {
        "MoRA, rotate": share_of(_nearest_update(spec, judged)),
        "M between the weight's leading sides": share_of(
            of_weight[:, :side].T @ judged @ to_weight[:side].T
        ),
        "M between the gradient's sides": share_of(
            left[:, :side].T @ judged @ right[:side].T
        ),
        "LoRA at its start": share_of(judged @ torch.linalg.qr(drawn)[0]),
        "LoRA, A turned to the gradient": share_of(judged @ right[:rank].T),
        "the mean input alone, as a bias": share_of(judged @ mean_input),
        "best of LoRA's rank": share_of(best),
    }


def _nearest_update(spec: OperatorSpec, gradient: Tensor) -> Tensor:
    """The update of this operator that is nearest to `gradient` (d_out, d_in), by
    conjugate gradients on M.

    The map from M to the weight has orthogonal columns but for groups that the sizes
    cut short, so few steps suffice.
    """
    mora_matrix = torch.zeros_like(adjoint(spec, gradient))
    residual = adjoint(spec, gradient)
    direction = residual
    for _ in range(CONJUGATE_STEPS):
        if residual.norm() <= 1e-9 * gradient.norm():
            break
        curved = adjoint(spec, delta_weight(spec, direction))
        length = residual.square().sum() / (direction * curved).sum()
        mora_matrix = mora_matrix + length * direction
        smaller = residual - length * curved
        direction = (
            smaller + smaller.square().sum() / residual.square().sum() * direction
        )
        residual = smaller
    return delta_weight(spec, mora_matrix)


if __name__ == "__main__":
    cli.run(main)
