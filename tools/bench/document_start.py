"""What a model makes of the token before a document: the perplexity of documents after each of some, and after none.

    python tools/bench/document_start.py --model DIR --text FILE [--starts none '<|endoftext|>'] [--json FILE]

Of the first tokens of every document those that have a predecessor in it are scored, the same ones for every start, in
the dtype of the model's files.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from mora_ds.common.errors import UserError
from mora_ds.data import AUTO, load_corpus, load_tokenizer, start_id
from mora_ds.models.load import load_model
from mora_ds.runtime import cli
from tools.bench.report import Report, json_flag


def main() -> None:
    options = _parser().parse_args()
    tokenizer = load_tokenizer(options.model, flag="--model")
    starts = {start: start_id(tokenizer, start) for start in options.starts}
    texts = islice(load_corpus([options.text], flag="--text").texts(), options.documents)
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens] for text in texts)
    documents = [ids for ids in encoded if len(ids) > 1]
    if not documents:
        raise UserError(
            f"--text {options.text}: there is no document of two tokens, or --documents, --tokens are too low"
        )
    model = load_model(Path(options.model), "auto", flag="--model").eval()
    report = Report(options)
    rows = [["start", "documents", "tokens", "perplexity"]]
    count = sum(len(ids) - 1 for ids in documents)
    for name, start in starts.items():
        nats = sum(_nats(model, [] if start is None else [start], ids) for ids in documents)
        rows.append([name, f"{len(documents):,}", f"{count:,}", f"{math.exp(nats / count):.2f}"])
    report.say(f"up to {options.tokens} tokens from the first one of each document on")
    report.show("starts", rows)
    report.write()


@torch.no_grad()
def _nats(model: Any, start: list[int], ids: list[int]) -> float:
    """Summed negative log-likelihood of the tokens from the second on."""
    logits = model(input_ids=torch.tensor([[*start, *ids[:-1]]])).logits[0, len(start) :]
    return F.cross_entropy(logits.float(), torch.tensor(ids[1:]), reduction="sum").item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--text", required=True, help="file of documents")
    parser.add_argument("--starts", nargs="+", default=[AUTO, "none"], metavar="TOKEN", help="as --document_start")
    parser.add_argument("--documents", type=int, default=400, help="how many are read, from the first on")
    parser.add_argument("--tokens", type=int, default=128, help="of each document, from its first on")
    json_flag(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)
