"""Score many adapters of one base, and serve them side by side: each row has its own.

    mora-ds evaluate-adapters MODEL DIR --sets held=held.jsonl

    bank = AdapterBank.open(MODEL, DIR, cache=32)
    with bank.use(["law", "code", None]):            one for each row; None: the base alone
        logits = bank.model(input_ids=ids).logits
    bank.generate(ids, adapters=["law", "code", "law"], max_new_tokens=20)

DIR holds adapters by their names (`adapter_io.export_adapter`), checkpoints or folders
of runs. In memory are the base once, the adapters used last, and the MoRA matrices of
the current batch. Nothing is merged and the base is never written to. In fp32 a row's
result is that of its adapter merged alone, up to rounding.

    y_b = W0 x_b + bias + sum over the cycles of b's adapter, merged or not: decompress(M compress(x_b))

Rows whose adapters have the same operator in a cycle, as runs of one seed have, share
one product.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.domains import update_rows
from mora_ds.adapters.ops.index_tables import IndexTables, tables_of
from mora_ds.adapters.ops.mora import OperatorSpec, operator_of
from mora_ds.checkpoint.adapter_files import Adapter
from mora_ds.checkpoint.layout import ADAPTER_JSON, adapter_folder, tokenizer_of
from mora_ds.commands.evaluate import (
    TITLES,
    check_scoring,
    read_sets,
    score_cells,
    score_sets,
    scoring_flags,
)
from mora_ds.common.errors import UserError, unknown
from mora_ds.common.files import JsonObject
from mora_ds.common.tensor_files import compute_dtype
from mora_ds.data import AUTO, load_tokenizer
from mora_ds.eval.perplexity import Target, Windows
from mora_ds.models.attention import prefer_documents
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import load_model
from mora_ds.runtime.cli import command_parser, record_and_say, say, table

BASE = "(base)"
"""The name of the base model in tables of adapters."""

Adapters = str | Sequence[str | None]
"""One name for all rows, or one (None: the base alone) for each."""

Squares = dict[str, dict[OperatorSpec, Tensor]]
"""Of one adapter: layer -> operator -> M, the sum over the cycles with that
operator."""


@dataclass(frozen=True)
class Term:
    """What the adapters of a batch with the same operator add to one layer."""

    spec: OperatorSpec
    tables: IndexTables
    """The operator's tables, which stay cached as long as they are held."""
    rows: Tensor
    """(n,) the rows that have an adapter with this operator."""
    squares: Tensor
    """(n, R, R), the matrix of each of them."""

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, T, O) plus the updates for x (B, T, D)."""
        rows = x.index_select(0, self.rows)
        update = update_rows(self.spec, self.squares.to(x.dtype), rows)
        return y.index_add(0, self.rows, update)


class AdapterBank:
    """A model with a folder of adapters, made by `open`. One thread at a time may use
    it."""

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, Adapter],
        dtype: torch.dtype,
        cache: int | None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.dtype = dtype
        self.squares_of = lru_cache(maxsize=cache)(self._read)
        """The MoRA matrices of an adapter; those used last stay in memory."""
        self._terms: dict[str, list[Term]] = {}
        """What the current batch adds to each layer."""
        self._rows: int | None = None
        """How many rows the terms are for; None: one adapter for any number of rows."""
        layers: set[str] = set()
        layers.update(*(adapter.file.layers for adapter in adapters.values()))
        for layer in layers:
            hook = partial(self._add_terms, layer)
            model.get_submodule(layer).register_forward_hook(hook)

    @classmethod
    def open(
        cls,
        base: Path | str,
        folder: Path | str,
        cache: int | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> "AdapterBank":
        """Load the base, in evaluation mode, and open every adapter; MoRA matrices are
        read when they are used.

        `base`: the model folder that all were trained on. `cache`: adapters that stay
        in memory after use; None: all. `dtype` "auto": the compute dtype of the
        adapters' runs if it is the same for all, else float32. Raises `UserError`
        naming an adapter that is damaged or does not fit: of another base, of another
        kind of update, or with other trained tensors (modules_to_save).
        """
        opened = BaseCheckpoint.open(base, "MODEL")
        adapters = {
            name: _open(name, path, opened)
            for name, path in find_adapters(Path(folder)).items()
        }
        dtypes = {adapter.file.dtype for adapter in adapters.values()}
        common = dtypes.pop() if len(dtypes) == 1 else "float32"
        chosen = compute_dtype(common if dtype == "auto" else dtype)
        model = load_model(opened.folder, chosen, None, trust_remote_code, "MODEL")
        return cls(
            model.requires_grad_(False).eval().to(device), adapters, chosen, cache
        )

    @contextmanager
    def use(self, adapters: Adapters) -> Iterator[None]:
        """Within the block every forward of `model` adds to each row the update of its
        adapter.

        `adapters`: a name for all rows, or a name (None: the base alone) for each row
        of the batches to come. Raises `UserError` for an unknown name, and in a forward
        for a batch with another number of rows.
        """
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        terms = self._terms_of(names)
        terms_before = self._terms
        rows_before = self._rows
        self._terms = terms
        self._rows = None if isinstance(adapters, str) else len(names)
        try:
            yield
        finally:
            self._terms = terms_before
            self._rows = rows_before

    @torch.no_grad()
    def generate(self, input_ids: Tensor, adapters: Adapters, **settings: Any) -> Any:
        """transformers' `generate` with an adapter for each row of `input_ids` (rows,
        tokens), and its return value.

        Rows that differ in length are padded on the left, with `attention_mask` among
        the settings. Raises `UserError` for another number of adapters than rows, and
        for settings that compute several sequences of a row.
        """
        if not isinstance(adapters, str) and len(adapters) != len(input_ids):
            raise UserError(
                f"adapters are named for {len(adapters)} row(s), but the batch has {len(input_ids)}"
            )
        with self.use(adapters):
            return self.model.generate(input_ids, **settings)

    def _read(self, name: str) -> Squares:
        adapter = self.adapters[name]
        layers: Squares = {}
        for layer, entry in adapter.file.layers.items():
            live = (entry.operator, adapter.tensors.square(layer))
            sums: dict[OperatorSpec, Tensor] = {}
            for spec, square in [*adapter.ledger.squares_of(layer), live]:
                operator = operator_of(spec, layer)
                sums[operator] = sums[operator] + square if operator in sums else square
            layers[layer] = {
                operator: square.to(self.model.device, self.dtype)
                for operator, square in sums.items()
            }
        return layers

    def _terms_of(self, names: Sequence[str | None]) -> dict[str, list[Term]]:
        """Layer -> what the adapters of all rows add to it."""
        chosen: dict[str, Squares] = {}
        for name in dict.fromkeys(names):
            if name is not None:
                if name not in self.adapters:
                    raise UserError(unknown("adapter", name, self.adapters))
                chosen[name] = self.squares_of(name)
        squares_by_row: dict[tuple[str, OperatorSpec], dict[int, Tensor]]
        squares_by_row = defaultdict(dict)
        for row, name in enumerate(names):
            for layer, squares in chosen.get(name or "", {}).items():
                for spec, square in squares.items():
                    squares_by_row[layer, spec][row] = square
        device = self.model.device
        terms: dict[str, list[Term]] = defaultdict(list)
        for (layer, spec), by_row in squares_by_row.items():
            rows = torch.tensor(list(by_row), device=device)
            stack = torch.stack(list(by_row.values()))
            terms[layer].append(Term(spec, tables_of(spec, device), rows, stack))
        return terms

    def _add_terms(
        self, layer: str, module: nn.Module, inputs: tuple[Tensor], y: Tensor
    ) -> Tensor:
        """Forward hook of a linear layer."""
        (x,) = inputs
        if layer not in self._terms:
            return y
        if self._rows is not None and (x.dim() < 3 or len(x) != self._rows):
            raise UserError(
                f"adapters are named for {self._rows} row(s), but {layer} reads {tuple(x.shape)}; where it does not "
                "see complete rows, give all rows one adapter"
            )
        count = self._rows or 1
        rows = x.reshape(count, -1, x.shape[-1])
        result = y.reshape(count, -1, y.shape[-1])
        for term in self._terms[layer]:
            result = term.add(result, rows)
        return result.view(y.shape)


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name -> folder with adapter.json, sorted. Raises `UserError` where there is
    none."""
    if not folder.is_dir():
        raise UserError(f"DIR: no such folder: {folder}")
    adapters = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # it is being written
            continue
        checkpoint = adapter_folder(path)
        if checkpoint is not None:
            adapters[path.name] = checkpoint
    if not adapters:
        raise UserError(f"DIR: no folder in {folder} holds an adapter ({ADAPTER_JSON})")
    return adapters


def _open(name: str, folder: Path, base: BaseCheckpoint) -> Adapter:
    """An adapter, each byte of its files checked. Raises `UserError` unless it belongs
    to the base and has one MoRA matrix a layer and nothing else."""
    try:
        adapter = Adapter.open(folder)
        adapter.reference.require_base(base, folder, "MODEL")
        for layer, entry in adapter.file.layers.items():
            operator_of(entry.operator, layer)
        unserved = {
            "MoRA matrices of domains": adapter.file.domains is not None,
            "other trained tensors than MoRA matrices": bool(adapter.file.trainables),
            "changes of the base's config": bool(adapter.reference.config_changes),
        }
        for what, holds in unserved.items():
            if holds:
                raise UserError(
                    f"it has {what}: evaluate it alone, with mora-ds evaluate"
                )
    except UserError as error:
        raise UserError(f"adapter {name!r} cannot be used: {error}") from error
    return adapter


# -- scores ----------------------------------------------------------------------------


def main() -> None:
    options = _parser().parse_args()
    check_scoring(options)
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
    model = prefer_documents(bank.model)
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
