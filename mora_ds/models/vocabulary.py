"""Extends a model's vocabulary by new rows in the embeddings and the head; everything else
is unchanged.

model folder + corpus -> new tokens (`data/extend_tokenizer.py`) -> their rows
                      -> tensors copied one at a time, config.json, tokenizer, vocabulary_extension.json

The row of a new token is the mean of the rows of the tokens that it replaces. The table
is padded to a multiple of 64 rows; rows without a token are the mean of all old rows.
"""

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import (
    FORMAT,
    atomic_folder,
    malformed,
    read_formatted,
    write_json_atomic,
)
from mora_ds.data import (
    Corpus,
    Extension,
    bpe_backend,
    candidate_tokens,
    check_extension,
    check_vocabulary,
    extend_tokenizer,
    has_tokenizer,
    load_tokenizer,
)
from mora_ds.models.base import BaseCheckpoint, map_model
from mora_ds.models.load import folder_config, make_model
from mora_ds.models.save import layout_of, write_companions, write_shards

EXTENSION_JSON = "vocabulary_extension.json"
ROW_MULTIPLE = 64
_COMPARED_BYTES = 4_000_000
"""Bytes of text, from the start of the corpus, for comparing both tokenizers."""

FLAG = "MODEL"


def extend_vocabulary(
    folder: Path,
    corpus: Corpus,
    new_tokens: int,
    output: Path,
    *,
    trust_remote_code: bool = False,
) -> list[str]:
    """Write a model with `new_tokens` more tokens, learned from `corpus`, to `output`.

    One tensor is in memory at a time. Returns lines to print. Raises `UserError` for a
    head that is neither tied nor linear, a corpus that yields fewer tokens, and a
    tokenizer that cannot be extended; `RunError` if the extended tokenizer does not
    decode a text to itself although the old one did.
    """
    if new_tokens < 1:
        raise UserError(f"--pieces must be at least 1, got {new_tokens}")
    base = BaseCheckpoint.open(folder, FLAG)
    config = folder_config(folder, trust_remote_code, FLAG)
    keys, old_rows = vocabulary_keys(base, config, trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code, flag=FLAG)
    check_vocabulary(tokenizer, old_rows, FLAG)
    # Fail for other tokenizers before the corpus is read
    bpe_backend(tokenizer)
    candidates = candidate_tokens(corpus.texts(), new_tokens)
    with tempfile.TemporaryDirectory() as scratch:
        extension = extend_tokenizer(tokenizer, candidates, new_tokens, Path(scratch))
        extended = check_extension(extension, config.model_type)
        before, after, compared = compare_tokenizers(
            tokenizer, extended, corpus.texts()
        )
        rows = max(extension.first_id + len(extension.tokens), old_rows)
        rows += -rows % ROW_MULTIPLE
        with atomic_folder(output.absolute()) as unfinished:
            write_extended(base, unfinished, keys, extension, rows)
    return [
        f"wrote {output}: {new_tokens:,} new tokens, {old_rows:,} -> {rows:,} rows",
        f"tokens per byte, on {compared:,} bytes of the corpus: {before:.4f} -> {after:.4f} "
        f"({after / before - 1:+.1%})",
    ]


def first_new_row(folder: Path) -> int:
    """Index of the first new row of an extended model. Raises `UserError` for a folder
    without an extended model."""
    path = folder / EXTENSION_JSON
    if not path.is_file():
        raise UserError(
            f"--train_new_embeddings: {folder} has no {EXTENSION_JSON}, so it was not written by mora-ds extend-vocab"
        )
    content = read_formatted(path)
    with malformed(path):
        return int(content["first_row"])


def check_same_tokens(
    known: Path,
    folder: Path,
    flag: str,
    trust_remote_code: bool,
) -> None:
    """Raise `UserError` that starts with `flag` unless the tokenizer in `folder` has
    every token of the tokenizer in `known`, with the same id. Does nothing if `known`
    has no tokenizer."""
    if not has_tokenizer(known):
        return
    load = partial(load_tokenizer, trust_remote_code=trust_remote_code, flag=flag)
    ids = load(known).get_vocab()
    ids_here = load(folder).get_vocab()
    different = sorted(
        (index, token) for token, index in ids.items() if ids_here.get(token) != index
    )
    if different:
        tokens = ", ".join(
            f"{token!r} ({index}, here {ids_here.get(token)})"
            for index, token in different[:3]
        )
        raise UserError(
            f"{flag} {folder}: {len(different)} token(s) of {known} do not have their ids here: {tokens}"
        )


# -- tensors with a row per token ------------------------------------------------------


def vocabulary_keys(
    base: BaseCheckpoint,
    config: Any,
    trust_remote_code: bool,
) -> tuple[set[str], int]:
    """(keys of the tensors with a row per token, number of rows). Raises `UserError`
    for unsupported heads."""
    with torch.device("meta"):
        model = make_model(config, FLAG, trust_remote_code=trust_remote_code)
    embedding, head = embedding_and_head(model)
    rows = embedding.num_embeddings
    others = []
    for name, table in model.named_modules():
        is_other = isinstance(table, nn.Embedding) and table is not embedding
        if is_other and table.num_embeddings == rows:
            others.append(name)
    if others or head.out_features != rows:
        raise UserError(
            f"{FLAG}: other tables also depend on the vocabulary ({', '.join(others) or 'the head'})"
        )
    wanted = {id(embedding.weight), *map(id, head.parameters(recurse=False))}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mapping = map_model(base, model, parameters)
    names = [name for name, parameter in parameters.items() if id(parameter) in wanted]
    # Files may contain a tied table under several names
    keys = {mapping[name] for name in names} | {name for name in names if name in base}
    return keys, rows


def embedding_and_head(model: Any) -> tuple[nn.Embedding, nn.Linear]:
    """The input embeddings (subclasses may scale them) and the head. Raises `UserError`
    for other types."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        kinds = f"a {type(embedding).__name__} and a {type(head).__name__}"
        raise UserError(
            f"{FLAG}: embeddings and head are {kinds}, not an nn.Embedding and an nn.Linear"
        )
    return embedding, head


# -- text ------------------------------------------------------------------------------


def compare_tokenizers(
    old: Any, new: Any, texts: Iterable[str]
) -> tuple[float, float, int]:
    """(tokens per byte of the old tokenizer, of the new one, bytes) for the first texts.

    Raises `RunError` for a text that only the old tokenizer decodes to itself.
    """
    before = after = nbytes = 0
    for text in texts:
        old_ids = old(text, add_special_tokens=False)["input_ids"]
        new_ids = new(text, add_special_tokens=False)["input_ids"]
        if old.decode(old_ids) == text != new.decode(new_ids):
            raise RunError(
                f"the extended tokenizer does not decode to the same text: {text[:60]!r}..."
            )
        before += len(old_ids)
        after += len(new_ids)
        nbytes += len(text.encode())
        if nbytes >= _COMPARED_BYTES:
            break
    return before / nbytes, after / nbytes, nbytes


# -- weights ---------------------------------------------------------------------------


def write_extended(
    base: BaseCheckpoint,
    folder: Path,
    keys: set[str],
    extension: Extension,
    rows: int,
) -> None:
    layout = layout_of(base, base.keys(), None)
    for key in keys:
        shape, dtype = layout[key]
        layout[key] = ((rows, *shape[1:]), dtype)

    def tensor_of(key: str, dtype: torch.dtype) -> Tensor:
        tensor = base.read(key)
        return extended_table(tensor, extension, rows) if key in keys else tensor

    write_shards(folder, layout, tensor_of)
    _, dtype = base.shape_dtype(min(keys))
    write_companions(base, folder, dtype, extension.folder, {"vocab_size": rows})
    content = {
        "format": FORMAT,
        "first_row": extension.first_id,
        "pieces": list(extension.tokens),
    }
    write_json_atomic(folder / EXTENSION_JSON, content)


def extended_table(table: Tensor, extension: Extension, rows: int) -> Tensor:
    """(old rows, ...) -> (rows, ...). The row of a new token is the mean, computed in
    fp32, of the rows of the tokens that it replaces. Rows without a token are the mean
    of all old rows, so the head gives them at most average probability."""
    result = table.new_empty((rows, *table.shape[1:]))
    known = min(len(table), extension.first_id)
    result[: len(table)] = table
    result[len(table) :] = table[:known].float().mean(dim=0).to(table.dtype)
    for row, old in enumerate(extension.replaced, start=extension.first_id):
        result[row] = table[list(old)].float().mean(dim=0).to(table.dtype)
    return result
