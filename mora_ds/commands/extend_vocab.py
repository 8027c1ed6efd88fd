"""Add tokens of a domain to the vocabulary of a model.

    mora-ds extend-vocab MODEL --corpus 'domain/*.jsonl' --pieces 4000 --output extended

The tokens come from a SentencePiece model trained on the corpus. Existing token ids and
merges stay, and each new embedding starts as the mean of those it replaces. Then train on
`extended` with --train_new_embeddings, or with --train_embeddings (and, for an untied head,
--train_head).
"""

import argparse

from mora_ds.common.errors import named_as_flags
from mora_ds.common.files import require_new
from mora_ds.runtime.cli import command_parser, say, shared_flags


@named_as_flags("output")
def main() -> None:
    flags = _parser().parse_args()
    from mora_ds.data import load_corpus
    from mora_ds.models.vocabulary import extend_vocabulary

    require_new(flags.output)
    lines = extend_vocabulary(
        flags.model,
        load_corpus(flags.corpus, text_column=flags.text_column, flag="--corpus"),
        flags.pieces,
        flags.output,
        trust_remote_code=flags.trust_remote_code,
    )
    say(*lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    shared_flags(parser, "model", help="folder of the model")
    parser.add_argument(
        "--corpus",
        nargs="+",
        required=True,
        help="files, patterns or folders of the domain's text",
    )
    parser.add_argument(
        "--pieces", type=int, required=True, help="number of tokens to add"
    )
    shared_flags(parser, "--output", "--text_column", "--trust_remote_code")
    return parser
