"""Tokenise text files into a folder for --train_files, filtered and without duplicates.

    mora-ds prepare-corpus --files 'corpus/*.jsonl' --tokenizer MODEL --output prepared

Reads text, JSON lines (also .gz), Parquet and Arrow in one pass. Exact duplicates are removed by a hash of the text
(without case and spacing), near duplicates by MinHash (`pip install -e '.[corpus]'`); they take about 100 bytes and
5 KB of memory per document. The same hash decides which documents are held out: `--eval_files held=prepared/held_out`
evaluates on them, and prepared/held_out.jsonl holds their text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mora_ds.common.errors import UserError
from mora_ds.data import AUTO, Filters, load_corpus, load_tokenizer, prepare_corpus


def main() -> None:
    given = _parser().parse_args()
    filters = Filters(given.min_characters, given.max_characters, given.near_duplicates, given.held_out)
    output: Path = given.output
    if output.is_symlink() or output.exists():
        if not given.overwrite:
            raise UserError(f"--output {output} exists already; give another folder, or --overwrite")
        if not (output / "prepared.json").is_file():
            raise UserError(f"--output {output} is no prepared folder; it is not overwritten")
    tokenizer = load_tokenizer(given.tokenizer, trust_remote_code=given.trust_remote_code, flag="--tokenizer")
    corpus = load_corpus(given.files, text_column=given.text_column, flag="--files")
    progress, processes = given.progress or sys.stderr.isatty(), given.preprocessing_workers
    report = prepare_corpus(
        corpus, tokenizer, output, filters, num_proc=processes, progress=progress, document_start=given.document_start
    )
    print("\n".join([*report.lines(), f"wrote {output}: --train_files {output}"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--files", nargs="+", required=True, help="files, patterns or folders")
    parser.add_argument("--tokenizer", required=True, help="folder, hub name or .model file: the model's own")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument("--text_column", default="text", help="column or JSON key that holds the text")
    parser.add_argument(
        "--document_start", default=AUTO, metavar="TOKEN", help="what stands before every document, as in the run"
    )
    parser.add_argument("--preprocessing_workers", type=int, default=1, help="processes; they do not change the result")
    parser.add_argument("--min_characters", type=int, default=1, help="shorter documents are dropped")
    parser.add_argument("--max_characters", type=int, default=0, help="longer documents are dropped; 0: none are")
    parser.add_argument(
        "--near_duplicates", type=float, default=0.8, metavar="SIMILARITY",
        help="share of runs of 5 words in common from which on a later document is dropped; 0: exact duplicates only",
    )  # fmt: skip
    parser.add_argument("--held_out", type=float, default=1.0, metavar="PERCENT", help="of documents, never trained on")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a hub tokenizer")
    parser.add_argument("--progress", action="store_true", help="show the bar even where stderr is no terminal")
    parser.add_argument("--overwrite", action="store_true", help="replace a prepared folder at --output")
    return parser
