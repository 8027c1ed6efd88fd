"""Measure perplexity and bits per byte of a Hugging Face model or a checkpoint.

    mora-ds evaluate out/checkpoints/latest --sets domain=held.jsonl general='prose/*.txt' --stride 256
    mora-ds evaluate MODEL --sets domain=held.jsonl --json scores.json
    mora-ds evaluate out --sets domain=held.jsonl general='prose/*.txt' --delta_scale 0.5

A checkpoint needs no merged model: base, merge ledger and current MoRA matrices are
combined in memory, the update multiplied by --delta_scale if asked to. Every document
is scored completely and separately. Bits per byte are comparable between models with
different tokenizers; perplexities are not.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from mora_ds.common.errors import (
    COUNT,
    UserError,
    named_as_flags,
    raise_validation_errors,
    wrong_values,
)
from mora_ds.common.fetched import with_urls
from mora_ds.runtime.cli import (
    check_device,
    check_writable,
    command_parser,
    record_and_say,
    say,
    shared_flags,
    table,
)

if TYPE_CHECKING:
    from mora_ds.data import Corpus
    from mora_ds.eval.perplexity import Score, Target, Windows


@named_as_flags("domain", "onto", "delta_scale", base="--base", base_folder="--base")
def main() -> None:
    options = _parser().parse_args()
    from mora_ds.deploy.combine import scaled
    from mora_ds.eval.perplexity import Windows, load_target

    check_scoring(options)
    sets = read_sets(options)
    with scaled(options.model, options.delta_scale, options.base) as path:
        target = load_target(
            path,
            options.base,
            options.dtype,
            options.device,
            options.trust_remote_code,
            options.domain,
            options.onto,
        )
    windows = Windows.of(target.model, options.window, options.stride)
    say(f"{options.model}; windows of {windows.window} tokens, stride {windows.stride}")
    scores = score_sets(target, sets, windows, options)
    content = {
        "model": with_urls(options.model),
        "window": windows.window,
        "stride": windows.stride,
        "sets": {name: score.to_dict() for name, score in scores.items()},
    }
    rows = [TITLES, *(score_cells(*named) for named in scores.items())]
    record_and_say(options.json, content, table(rows))


def check_scoring(options: argparse.Namespace) -> None:
    """Raise `UserError` for wrong values of `scoring_flags`."""
    if not options.sets:
        raise UserError("nothing to evaluate on: give --sets NAME=PATH")
    check_writable("--json", options.json)
    check_device(options.device)
    raise_validation_errors(
        wrong_values(options, {"batch_size": COUNT, "max_documents": COUNT})
    )


def read_sets(options: argparse.Namespace) -> dict[str, Corpus]:
    """The texts of --sets by their names."""
    from mora_ds.data import load_corpus
    from mora_ds.eval.perplexity import named_sets

    return {
        name: load_corpus(
            [path], text_column=options.text_column, flag=f"--sets {name}"
        )
        for name, path in named_sets(options.sets).items()
    }


def score_sets(
    target: Target,
    sets: dict[str, Corpus],
    windows: Windows,
    options: argparse.Namespace,
) -> dict[str, Score]:
    """The score of every set, by its name. Without --document_start documents start as
    in the run of the target."""
    from mora_ds.eval.perplexity import evaluate

    document_start = options.document_start or target.document_start
    windows = replace(windows, document_start=document_start)
    return {
        name: evaluate(
            target, corpus, windows, options.batch_size, options.max_documents
        )
        for name, corpus in sets.items()
    }


TITLES = ["set", "documents", "tokens", "bytes", "perplexity", "bits/byte"]


def score_cells(name: str, score: Score) -> list[str]:
    """The row of a set in a table of scores, below `TITLES`."""
    return [
        name,
        f"{score.documents:,}",
        f"{score.tokens:,}",
        f"{score.text_bytes:,}",
        f"{score.perplexity:.4f}",
        f"{score.bits_per_byte:.4f}",
    ]


def scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what a model is scored on, and how."""
    parser.add_argument(
        "--sets",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="files or patterns, each a set: PATH or NAME=PATH",
    )
    parser.add_argument(
        "--window",
        type=int,
        help="tokens of a window. Default: the model's positions, at most 1024",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens from one window to the next. Default: half of --window",
    )
    parser.add_argument(
        "--document_start", metavar="TOKEN",
        help="as in mora-ds pretrain. Default: that of the run; auto with --onto and for other models",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=4, help="windows at a time")
    parser.add_argument(
        "--max_documents", type=int, help="score only the first ones of each set"
    )
    shared_flags(parser, "--dtype", help="auto: the model's own")
    shared_flags(parser, "--text_column", "--device", "--json", "--trust_remote_code")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    text = "model folder, checkpoint, run's folder, or adapter"
    shared_flags(parser, "model", help=text)
    scoring_flags(parser)
    shared_flags(parser, "--base", "--domain", "--onto", "--delta_scale")
    return parser
