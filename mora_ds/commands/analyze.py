"""Analyse the weights of a model layer by layer, and plan which layers to adapt under a budget.

    mora-ds analyze MODEL --json weights.json --png weights.png
    mora-ds analyze MODEL --probe 'domain/*.jsonl' --trainable_budget 0.5% --write targets.yaml

The first command reads the weights only, one at a time. With --probe, norms of gradients are measured on a few batches
too. --write writes the plan for --targets, by the scores of the probe if there is one, else by those of the weights.
Exit code 2: an error that you can correct in the command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mora_ds.adapters.config import ALL_LINEAR, MoRAConfig
from mora_ds.adapters.ops.subspace import SUBSPACE
from mora_ds.adapters.target_plan import BY_PROBE, BY_WEIGHTS, parse_budget
from mora_ds.common.errors import UserError
from mora_ds.data import load_corpus
from mora_ds.eval.gradient_probe import FLAG, GradientMeasures, probe, token_batches
from mora_ds.eval.perplexity import load_target
from mora_ds.eval.weight_report import report_lines, require_matplotlib, write_heat_map, write_report
from mora_ds.eval.weights import EXACT_UP_TO, analyse
from mora_ds.runtime.cli import check_device, check_writable
from mora_ds.train.targets import open_model


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
    if given.png:
        write_heat_map(given.png, rows, gradients)
    if given.write:
        scores = {each.module: each.score for each in gradients.values() or rows}
        plan = opened.plan(scores, BY_PROBE if gradients else BY_WEIGHTS, config, given.trainable_budget)
        plan.write(given.write)
        print(f"{plan}\nwrote {given.write}: --targets {given.write}")


def _check(given: argparse.Namespace) -> None:
    for flag in ("json", "png", "write"):
        check_writable(f"--{flag}", getattr(given, flag))
    if given.png:
        require_matplotlib()
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with safetensors")
    parser.add_argument("--target_modules", nargs="+", default=[ALL_LINEAR], help="which layers, as in training")
    parser.add_argument(
        "--exact_up_to",
        type=int,
        default=EXACT_UP_TO,
        help="largest shorter side of a weight that is decomposed exactly; larger ones are estimated",
    )
    parser.add_argument("--json", type=Path, help="file for all measures of all layers")
    parser.add_argument("--png", type=Path, help="file for a heat map; needs matplotlib")
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
    parser.add_argument("--write", type=Path, metavar="FILE", help="the plan for --targets")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser
