"""Analyse the weights of a model layer by layer, and plan which layers to adapt under a budget.

    mora-ds analyze MODEL --json weights.json
    mora-ds analyze MODEL --probe 'domain/*.jsonl' --trainable_budget 0.5% --write targets.yaml

The first command reads the weights only, one at a time. With --probe, the gradients of a few batches are measured too:
|dL/dM| at M = 0, for the chosen operator and rank, the root of the mean over batches of the squared Frobenius norm of a
batch's gradient (its loss being the mean over tokens). --write writes the plan for `research.targets`, by the scores of
the probe if there is one, else by those of the weights. Exit code 2: an error that you can correct in the command.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.config import ALL_LINEAR, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.common.errors import COUNT, Bounds, RunError, UserError, refuse, wrong_values
from mora_ds.common.files import write_json_atomic
from mora_ds.config.adapter import AdapterArguments
from mora_ds.data import Document, load_corpus
from mora_ds.eval.perplexity import load_target
from mora_ds.models.rope import longest_row
from mora_ds.research.targets import OpenModel, parse_budget
from mora_ds.research.weights import LEADING, WeightMeasures, analyse
from mora_ds.runtime.cli import check_device, check_writable, command_parser, shared_flags, table

FLAG = "--probe"


def main() -> None:
    options = _parser().parse_args()
    settings = AdapterArguments(
        mora_rank=options.mora_rank,
        operator=options.operator,
        target_modules=options.target_modules,
    )
    refuse(settings.problems())
    config = settings.mora_config(MoRAConfig.seed)
    _check(options)
    opened = OpenModel.in_folder(
        options.model,
        options.target_modules,
        options.trust_remote_code,
    )
    if options.write:  # before the long part
        opened.check_budget(config, options.trainable_budget)
    gradients = _probe(options, config) if options.probe else {}
    weights = list(analyse(opened.base, opened.weights, options.device))
    print("\n".join(report_lines(weights, gradients)))
    if options.json:
        layers: list[dict[str, Any]] = []
        for measures in weights:
            gradient = gradients.get(measures.module)
            layers.append(measures.to_dict() | ({} if gradient is None else {"gradient": gradient.to_dict()}))
        write_json_atomic(options.json, {"format": 1, "model": str(options.model), "layers": layers})
    if options.write:
        if gradients:
            scores = {module: gradient.score for module, gradient in gradients.items()}
        else:
            scores = {measures.module: measures.score for measures in weights}
        plan = opened.plan(
            scores,
            "probe" if gradients else "weights",
            config,
            options.trainable_budget,
        )
        plan.write(options.write)
        print(f"{plan}\nwrote {options.write}: research.targets of a recipe takes it")


def _check(options: argparse.Namespace) -> None:
    for flag in ("json", "write"):
        check_writable(f"--{flag}", getattr(options, flag))
    if (options.write is None) != (options.trainable_budget is None):
        raise UserError("--trainable_budget and --write belong together: a plan is made under a budget, and written")
    if options.trainable_budget is not None:
        parse_budget(options.trainable_budget)
    refuse(wrong_values(options, {"probe_batches": COUNT, "seq_len": Bounds(least=2)}))
    check_device(options.device)


def _probe(options: argparse.Namespace, config: MoRAConfig) -> dict[str, GradientMeasures]:
    corpus = load_corpus(options.probe, text_column=options.text_column, flag=FLAG)
    target = load_target(
        options.model,
        None,
        "float32",
        options.device,
        options.trust_remote_code,
    )
    longest = longest_row(target.model.config) or options.seq_len
    if options.seq_len > longest:
        raise UserError(f"--seq_len {options.seq_len} is longer than the model's {longest} positions")
    batches = token_batches(
        corpus,
        target.tokenizer,
        options.seq_len,
        options.probe_batches,
    )
    print(f"probe: {sum(ids.numel() for ids in batches):,} tokens in {len(batches)} batch(es), {config.title}")
    return probe(target.model, config, batches)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a Hugging Face folder with safetensors",
    )
    parser.add_argument(
        "--target_modules",
        nargs="+",
        default=[ALL_LINEAR],
        help="which layers, as in training",
    )
    parser.add_argument(
        "--probe",
        nargs="+",
        metavar="FILES",
        help="text whose gradients are measured",
    )
    parser.add_argument(
        "--probe_batches",
        type=int,
        default=8,
        help="how many batches of it, of a sequence each",
    )
    parser.add_argument("--seq_len", type=int, default=512, help="tokens of a sequence")
    parser.add_argument(
        "--mora_rank", type=int, default=8, help="rank of the adapter that is probed; it decides the operator"
    )
    parser.add_argument(
        "--operator",
        default="auto",
        help="operator of the plan and the probe",
    )
    parser.add_argument(
        "--trainable_budget", help="trainable parameters: a share of the model's, such as 0.5%%, or a number"
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="the plan for research.targets of a recipe",
    )
    shared_flags(parser, "--json", "--device", "--text_column", "--trust_remote_code")
    return parser


# -- the probe ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientMeasures:
    """The gradient of one layer's MoRA matrix."""

    r_hat: int
    norm: float
    """|dL/dM| at M = 0."""

    @property
    def score(self) -> float:
        """Root mean square of the entries of dL/dM: the decrease of the loss, to first order, for each parameter that
        Adam changes by one unit."""
        return self.norm / self.r_hat

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}


def probe(model: Any, config: MoRAConfig, batches: Sequence[Tensor]) -> dict[str, GradientMeasures]:
    """Module name -> the measures of every layer that `config` adapts. `batches`: (rows, T) token ids each.

    `model`: of transformers, without adapters; afterwards it has MoRA matrices of zeros. Peak memory in addition to
    the model: what a training step saves. Raises `RunError` for a gradient that is not finite.
    """
    inject(model, config)
    model.eval()  # no dropout: the same on every call
    layers = mora_layers(model)
    energies = dict.fromkeys(layers, 0.0)
    for ids in batches:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        labels = ids.to(logits.device)[:, 1:].flatten()
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels).backward()
        for name, layer in layers.items():
            if layer.value.grad is not None:  # None where no token has reached the layer
                energies[name] += torch.linalg.vector_norm(layer.value.grad, dtype=torch.float64).item() ** 2
        model.zero_grad(set_to_none=True)
    for name, energy in energies.items():
        if not math.isfinite(energy):
            raise RunError(f"{name}: its gradient is not finite")
    return {
        name: GradientMeasures(layer.value.shape[0], math.sqrt(energies[name] / len(batches)))
        for name, layer in layers.items()
    }


def token_batches(documents: Iterable[Document], tokenizer: Any, seq_len: int, count: int) -> list[Tensor]:
    """At most `count` batches (1, seq_len) of the first documents' tokens, with end-of-text between documents.

    Text of fewer than `seq_len` tokens gives one batch of a shorter row. Raises `UserError` for fewer than two
    tokens.
    """
    ids = torch.tensor(list(islice(_tokens(documents, tokenizer), count * seq_len)), dtype=torch.long)
    if len(ids) < 2:
        raise UserError(f"{FLAG}: there are fewer than two tokens in it")
    if len(ids) < seq_len:
        return [ids.unsqueeze(0)]
    return list(ids[: len(ids) // seq_len * seq_len].view(-1, 1, seq_len))


def _tokens(documents: Iterable[Document], tokenizer: Any) -> Iterator[int]:
    is_first = True
    end = tokenizer.eos_token_id
    for document in documents:
        if document.begins and not is_first and end is not None:
            yield end
        is_first = False
        yield from tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]


# -- the report --------------------------------------------------------------------------------------------------------


def report_lines(weights: Sequence[WeightMeasures], gradients: Mapping[str, GradientMeasures]) -> list[str]:
    """A table of every layer. `gradients`: by module; empty without a probe."""
    rows = [["layer", "d_in", "d_out", "norm", "s_1", "stable", "effective", "of full"]]
    if gradients:
        rows[0].append("|dL/dM|")
    for measures in weights:
        row = [measures.module + ("*" if measures.is_estimated else ""), str(measures.d_in), str(measures.d_out)]
        row += [f"{measures.norm:.3e}", f"{measures.largest:.3e}"]
        row += [f"{measures.stable_rank:.1f}", f"{measures.effective_rank:.1f}", f"{measures.score:.1%}"]
        if gradients:
            row.append(f"{gradients[measures.module].norm:.3e}")
        rows.append(row)
    legend = "stable: |W|^2 / s_1^2; effective: exp of the entropy of s_i^2 / |W|^2, and as a share of the shorter side"
    if any(measures.is_estimated for measures in weights):
        legend += f"; *: estimated from the leading {LEADING} values and the norm"
    if gradients:
        legend += "; |dL/dM|: norm of the gradient at M = 0, root mean square over batches"
    return [*table(rows), legend]
