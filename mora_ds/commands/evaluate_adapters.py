"""Measure perplexity and bits per byte of many adapters of one base.

mora-ds evaluate-adapters MODEL DIR --sets held=held.jsonl
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mora_ds.commands.evaluate import (
    TITLES,
    check_scoring,
    read_sets,
    score_cells,
    score_sets,
    scoring_flags,
)
from mora_ds.runtime.cli import (
    command_parser,
    path_on_disk,
    record_and_say,
    say,
    shared_flags,
    table,
)

if TYPE_CHECKING:
    from mora_ds.common.files import JsonObject

BASE = "(base)"
"""The name of the base model in tables of adapters."""


def main() -> None:
    options = _parser().parse_args()
    check_scoring(options)
    from mora_ds.checkpoint.layout import tokenizer_of
    from mora_ds.data import AUTO, load_tokenizer
    from mora_ds.eval.perplexity import Target, Windows, document_start_of
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
    windows = Windows.of(bank.model, options.window, options.stride)
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
        document_start = AUTO
        if name != BASE:
            adapter = bank.adapters[name]
            document_start = document_start_of(adapter.file)
            # An adapter whose run had a tokenizer of its own is scored with that.
            if folder := tokenizer_of(adapter.folder):
                tokenizer = load_tokenizer(folder, flag=str(folder))
        target = Target(model, tokenizer, document_start)
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
    shared_flags(parser, "model", help="the base of all adapters")
    parser.add_argument(
        "folder",
        type=path_on_disk,
        metavar="DIR",
        help="a folder of adapters, checkpoints or runs",
    )
    scoring_flags(parser)
    return parser
