"""Tokenize the text of a training run ahead of it, on a machine without GPUs for
example.

    mora-ds prepare-corpus [RECIPE.yaml] --cache_dir /shared/tokens --preprocessing_workers 32 [the flags of the run]

Takes the settings of `mora-ds pretrain` and fills the token cache that --cache_dir
names. A run with the same tokenizer, text and --cache_dir finds the tokens there,
however many processes it has.
"""

import sys

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.runtime.cli import say


def main() -> None:
    arguments = parse(sys.argv[1:])
    if not arguments.data.names_text:
        raise UserError(
            "there is no text to tokenize: name it with --train_files, --dataset_name or --mixture"
        )
    validate(arguments)
    from mora_ds.train.data import fill_token_cache

    shows_progress = sys.stderr.isatty()
    for name, cache in fill_token_cache(
        arguments.model, arguments.data, shows_progress
    ):
        counts = f"{cache.n_documents:,} documents, {cache.n_tokens:,} tokens"
        say(f"{name}: {counts} in {cache.folder}")
