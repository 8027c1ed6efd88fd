"""Analyse the weights of a model layer by layer, and plan which layers to adapt under a budget.

    mora-ds analyze MODEL --json weights.json
    mora-ds analyze MODEL --probe 'domain/*.jsonl' --trainable_budget 0.5% --write targets.yaml

The first command reads the weights only, one at a time. With --probe, norms of gradients are measured on a few batches
too: |dL/dM| at M = 0, for the chosen operator and rank, and |dL/dW| of the frozen weight, g^T x of a layer's inputs x
and output gradients g. Both are roots of the mean, over batches, of the squared Frobenius norm of a batch's gradient
(its loss being the mean over tokens). --write writes the plan for `research.targets`, by the scores of the probe if
there is one, else by those of the weights. Exit code 2: an error that you can correct in the command.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.config import ALL_LINEAR, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.subspace import SUBSPACE
from mora_ds.adapters.target_modules import ending_of
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import write_json_atomic
from mora_ds.data import Document, load_corpus
from mora_ds.eval.ledger_summary import mean
from mora_ds.eval.perplexity import load_target
from mora_ds.research.targets import BY_PROBE, BY_WEIGHTS, open_model, parse_budget
from mora_ds.research.weights import ESTIMATED, EXACT_UP_TO, LEADING, SHARES, WeightMeasures, analyse
from mora_ds.runtime.cli import check_device, check_writable, command_parser, table

FLAG = "--probe"


def main() -> None:
    given = _parser().parse_args()
    config = MoRAConfig(rank=given.mora_rank, operator=given.operator, target_modules=tuple(given.target_modules))
    _check(given)
    opened = open_model(given.model, given.target_modules, given.trust_remote_code)
    if given.write:  # before the long part
        opened.check_budget(config, given.trainable_budget)
    gradients = _probe(given, config) if given.probe else {}
    rows = list(analyse(opened.base, opened.weights, given.exact_up_to, given.device))
    print("\n".join(report_lines(rows, gradients)))
    if given.json:
        write_report(given.json, str(given.model), rows, gradients)
    if given.write:
        scores = {each.module: each.score for each in gradients.values() or rows}
        plan = opened.plan(scores, BY_PROBE if gradients else BY_WEIGHTS, config, given.trainable_budget)
        plan.write(given.write)
        print(f"{plan}\nwrote {given.write}: research.targets of a recipe takes it")


def _check(given: argparse.Namespace) -> None:
    for flag in ("json", "write"):
        check_writable(f"--{flag}", getattr(given, flag))
    if (given.write is None) != (given.trainable_budget is None):
        raise UserError("--trainable_budget and --write belong together: a plan is made under a budget, and written")
    if given.probe and given.operator == SUBSPACE:
        raise UserError(
            "--probe has no singular vectors for --operator subspace: plan it by the weights, or probe another operator"
        )
    if given.trainable_budget is not None:
        parse_budget(given.trainable_budget)
    for name in ("exact_up_to", "probe_batches", "batch_size"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(given, name)}")
    if given.seq_len < 2:
        raise UserError(f"--seq_len must be at least 2, got {given.seq_len}")
    check_device(given.device)


def _probe(given: argparse.Namespace, config: MoRAConfig) -> dict[str, GradientMeasures]:
    corpus = load_corpus(given.probe, text_column=given.text_column, flag=FLAG)
    target = load_target(given.model, None, "float32", given.device, given.trust_remote_code)
    longest = getattr(target.model.config.get_text_config(), "max_position_embeddings", None) or given.seq_len
    if given.seq_len > longest:
        raise UserError(f"--seq_len {given.seq_len} is longer than the model's {longest} positions")
    batches = token_batches(corpus, target.tokenizer, given.seq_len, given.probe_batches, given.batch_size)
    print(f"probe: {sum(ids.numel() for ids in batches):,} tokens in {len(batches)} batch(es), {config.title}")
    return {each.module: each for each in probe(target.model, config, batches)}


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with safetensors")
    parser.add_argument("--target_modules", nargs="+", default=[ALL_LINEAR], help="which layers, as in training")
    parser.add_argument(
        "--exact_up_to",
        type=int,
        default=EXACT_UP_TO,
        help="largest shorter side of a weight that is decomposed exactly; larger ones are estimated",
    )
    parser.add_argument("--json", type=Path, help="file for all measures of all layers")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    parser.add_argument("--probe", nargs="+", metavar="FILES", help="text whose gradients are measured")
    parser.add_argument("--probe_batches", type=int, default=8, help="how many batches of it")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences of a batch")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--text_column", default="text", help="column or JSON key that holds the text")
    parser.add_argument(
        "--mora_rank", type=int, default=8, help="rank of the adapter that is probed; it decides the operator"
    )
    parser.add_argument("--operator", default="auto", help="operator of the plan and the probe")
    parser.add_argument(
        "--trainable_budget", help="trainable parameters: a share of the model's, such as 0.5%%, or a number"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="the plan for research.targets of a recipe")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


# -- the probe ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientMeasures:
    """Norms of the gradients of one layer."""

    module: str
    d_in: int
    d_out: int
    r_hat: int
    """Side of the MoRA matrix that was probed."""
    square_norm: float
    """|dL/dM| at M = 0."""
    weight_norm: float
    """|dL/dW|."""

    @property
    def score(self) -> float:
        """Root mean square of the entries of dL/dM: the decrease of the loss, to first order, for each parameter that
        Adam changes by one unit."""
        return self.square_norm / self.r_hat

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}


def probe(model: Any, config: MoRAConfig, batches: Sequence[Tensor]) -> list[GradientMeasures]:
    """The measures of every layer that `config` adapts, in the model's order. `batches`: (rows, T) token ids each.

    `model`: of transformers, without adapters; afterwards it has MoRA matrices of zeros. Peak memory in addition to
    the model: what a training step saves, every layer's input, and one gradient of the size of a weight. Raises
    `RunError` for a gradient that is not finite.
    """
    inject(model, config)
    model.eval()  # no dropout: the same on every call
    layers = mora_layers(model)
    of_matrices, of_weights = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[..., None]:
        def forward(layer: AdaptedLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def backward(g: Tensor) -> None:
                of_weights[name] += _energy(g.flatten(0, -2).T @ x)

            output.register_hook(backward)

        return forward

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        for ids in batches:
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            targets = ids.to(logits.device)[:, 1:].flatten()
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets).backward()
            for name, layer in layers.items():
                of_matrices[name] += _energy(layer.value.grad)
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    measures = []
    for name, layer in layers.items():
        energies = of_matrices[name], of_weights[name]
        if not all(map(math.isfinite, energies)):
            raise RunError(f"{name}: its gradient is not finite")
        norms = (math.sqrt(energy / len(batches)) for energy in energies)
        measures.append(GradientMeasures(name, layer.in_features, layer.out_features, layer.value.shape[0], *norms))
    return measures


def _energy(gradient: Tensor | None) -> float:
    """Squared Frobenius norm; 0 for a layer that no token has reached, such as an expert's."""
    return 0.0 if gradient is None else torch.linalg.vector_norm(gradient, dtype=torch.float64).item() ** 2


def token_batches(documents: Iterable[Document], tokenizer: Any, seq_len: int, count: int, rows: int) -> list[Tensor]:
    """At most `count` batches (rows, seq_len) of the first documents' tokens, with end-of-text between documents.

    Text of fewer than `seq_len` tokens gives one batch of a single, shorter row. Raises `UserError` for fewer than two
    tokens.
    """
    wanted = count * rows * seq_len
    ids = torch.tensor(list(islice(_tokens(documents, tokenizer), wanted)), dtype=torch.long)
    if len(ids) < 2:
        raise UserError(f"{FLAG}: there are fewer than two tokens in it")
    if len(ids) < seq_len:
        return [ids.unsqueeze(0)]
    return list(ids[: len(ids) // seq_len * seq_len].view(-1, seq_len).split(rows))


def _tokens(documents: Iterable[Document], tokenizer: Any) -> Iterator[int]:
    first, end = True, tokenizer.eos_token_id
    for document in documents:
        if document.begins and not first and end is not None:
            yield end
        first = False
        yield from tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]


# -- the report --------------------------------------------------------------------------------------------------------

Gradients = Mapping[str, GradientMeasures]
"""Module -> result of the gradient probe; empty without a probe."""

_TITLES = ["d_in", "d_out", "norm", "s_1", "stable", "effective", "of full", *(f"{share:.0%}" for share in SHARES)]


def report_lines(rows: Sequence[WeightMeasures], gradients: Gradients) -> list[str]:
    """Tables of every layer, and of the means over layers of a type."""
    more = ["|dL/dM|", "|dL/dW|"] if gradients else []
    layers = [[row.module + ("*" if row.method == ESTIMATED else ""), *_cells([row], gradients)] for row in rows]
    types = [[name, str(len(layers)), *_cells(layers, gradients)] for name, layers in by_type(rows).items()]
    note = (
        "stable: |W|^2 / s_1^2; effective: exp of the entropy of s_i^2 / |W|^2, and as a share of the shorter side; "
        f"{', '.join(f'{share:.0%}' for share in SHARES)}: how many singular values hold that share of the energy"
    )
    if any(row.method == ESTIMATED for row in rows):
        note += f"; *: estimated from the leading {LEADING} values and the norm"
    if gradients:
        note += "; |dL/dM|, |dL/dW|: norms of gradients at M = 0, root mean square over batches"
    return [
        *table([["layer", *_TITLES, *more], *layers]), "", *table([["type", "layers", *_TITLES, *more], *types]), note
    ]  # fmt: skip


def by_type(rows: Sequence[WeightMeasures]) -> dict[str, list[WeightMeasures]]:
    """The layers by the last part of their names."""
    types: dict[str, list[WeightMeasures]] = {}
    for row in rows:
        types.setdefault(ending_of(row.module), []).append(row)
    return types


def _cells(rows: Sequence[WeightMeasures], gradients: Gradients) -> list[str]:
    cells = [
        f"{mean(row.d_in for row in rows):.0f}", f"{mean(row.d_out for row in rows):.0f}",
        f"{mean(row.norm for row in rows):.3e}", f"{mean(row.leading[0] for row in rows):.3e}",
        f"{mean(row.stable_rank for row in rows):.1f}", f"{mean(row.effective_rank for row in rows):.1f}",
        f"{mean(row.score for row in rows):.1%}",
        *(f"{mean(row.energy_ranks[index] for row in rows):.0f}" for index in range(len(SHARES))),
    ]  # fmt: skip
    if gradients:
        probed = [gradients[row.module] for row in rows if row.module in gradients]
        cells += [
            f"{mean(each.square_norm for each in probed):.3e}",
            f"{mean(each.weight_norm for each in probed):.3e}",
        ]
    return cells


def write_report(path: Path, model: str, rows: Sequence[WeightMeasures], gradients: Gradients) -> None:
    """Writes every measure of every layer as JSON, atomically."""
    layers = [
        {**row.to_dict(), **({"gradients": gradients[row.module].to_dict()} if row.module in gradients else {})}
        for row in rows
    ]
    write_json_atomic(path, {"format": 1, "model": model, "energy_shares": list(SHARES), "layers": layers})
