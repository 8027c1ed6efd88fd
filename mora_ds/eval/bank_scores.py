"""Every adapter of a bank on named texts, one after the other over one base: figures and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mora_ds.checkpoint.adapter_files import adapter_folder
from mora_ds.data import Corpus, load_tokenizer
from mora_ds.deploy.bank import AdapterBank
from mora_ds.errors import UserError
from mora_ds.eval.perplexity import Score, Target, Windows, evaluate

BASE = "(base)"
"""Under which the base itself stands among the adapters."""


def evaluate_bank(
    bank: AdapterBank,
    sets: Mapping[str, Corpus],
    windows: Windows,
    names: Sequence[str],
    batch_size: int = 4,
    max_documents: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Score]]:
    """Adapter -> set -> score, the base first. A checkpoint's own tokenizer goes before the base's, as in its run.

    Raises `UserError` for an unknown name, and one whose headers are damaged, before anything is evaluated; for one
    whose squares are, when its turn comes.
    """
    bank.check_names(names)
    for name in names:
        if name in bank.damaged:
            raise UserError(f"adapter {name!r} cannot be used: {bank.damaged[name]}")
    tokenizer = load_tokenizer(bank.base, trust_remote_code=trust_remote_code, flag="MODEL")
    scores = {BASE: _scores(Target(bank.model, tokenizer, BASE), sets, windows, batch_size, max_documents)}
    for name in names:
        folder = adapter_folder(bank.folders[name])
        own = None if folder is None else folder / "tokenizer"
        each = load_tokenizer(own, flag=str(own)) if own is not None and own.is_dir() else tokenizer
        with bank.use(name):
            scores[name] = _scores(Target(bank.model, each, name), sets, windows, batch_size, max_documents)
    return scores


def _scores(
    target: Target, sets: Mapping[str, Corpus], windows: Windows, batch_size: int, max_documents: int | None
) -> dict[str, Score]:
    return {name: evaluate(target, corpus, windows, batch_size, max_documents) for name, corpus in sets.items()}


def bank_rows(scores: Mapping[str, Mapping[str, Score]]) -> list[list[str]]:
    """Titles, and a line an adapter: perplexity and bits per byte of every set."""
    sets = list(next(iter(scores.values())))
    titles = [f"{name}: {figure}" for name in sets for figure in ("perplexity", "bits/byte")]
    rows = [
        [adapter, *(f"{figure:.4f}" for name in sets for figure in (found[name].perplexity, found[name].bits_per_byte))]
        for adapter, found in scores.items()
    ]
    return [["adapter", *titles], *rows]
