"""Measure perplexity and bits per byte of many adapters of one base.

mora-ds evaluate-adapters MODEL DIR --sets held=held.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mora_ds.commands.evaluate import (
    TITLES,
    check_scoring,
    read_sets,
    score_cells,
    score_sets,
    scoring_flags,
)
from mora_ds.runtime.cli import command_parser, record_and_say, say, table

if TYPE_CHECKING:
    from mora_ds.common.files import JsonObject

BASE = "(base)"
"""The name of the base model in tables of adapters."""


def main() -> None:
    options = _parser().parse_args()
    check_scoring(options)
    from mora_ds.checkpoint.layout import tokenizer_of
    from mora_ds.data import AUTO, load_tokenizer
    from mora_ds.eval.perplexity import Target, Windows
    from mora_ds.models.attention import prefer_document_attention
    from mora_ds.research.bank import AdapterBank

    sets = read_sets(options)
    bank = AdapterBank.open(
        options.model,
        options.folder,
        1,
        options.dtype,
        options.device,
        options.trust_remote_code,
    )
    document_start = options.document_start or AUTO
    windows = Windows.of(bank.model, options.window, options.stride, document_start)
    sizes = {"window": windows.window, "stride": windows.stride}
    say(
        f"{len(bank.adapters)} adapter(s); windows of {windows.window} tokens, stride {windows.stride}"
    )
    base_tokenizer = load_tokenizer(
        options.model, trust_remote_code=options.trust_remote_code, flag="MODEL"
    )
    model = prefer_document_attention(bank.model)
    rows = [["adapter", *TITLES]]
    results: dict[str, JsonObject] = {}
    for name in (BASE, *bank.adapters):
        tokenizer = base_tokenizer
        # An adapter whose run had a tokenizer of its own is scored with that.
        folder = None if name == BASE else tokenizer_of(bank.adapters[name].folder)
        if folder is not None:
            tokenizer = load_tokenizer(folder, flag=str(folder))
        target = Target(model, tokenizer)
        with bank.use([] if name == BASE else name):
            scores = score_sets(target, sets, windows, options)
        rows += [
            [name, *score_cells(set_name, score)] for set_name, score in scores.items()
        ]
        results[name] = {
            set_name: score.to_dict() for set_name, score in scores.items()
        }
    record_and_say(options.json, {**sizes, "adapters": results}, table(rows))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="the base of all adapters"
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="a folder of adapters, checkpoints or runs",
    )
    scoring_flags(parser)
    return parser
