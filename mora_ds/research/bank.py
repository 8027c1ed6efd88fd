"""Score many adapters of one base in one process, and serve them side by side: each row of a batch with its own.

    mora-ds evaluate-adapters MODEL DIR --sets held=held.jsonl

    bank = AdapterBank.open(MODEL, DIR, cache=32)
    with bank.use(["law", "code", None]):            one for each row; None: the base alone
        logits = bank.model(input_ids=ids).logits
    bank.generate(ids, adapters=["law", "code", "law"], max_new_tokens=20)

DIR holds adapters by their names (`adapter_io.export_adapter`), checkpoints or folders of runs. In memory are the base
once, the adapters used last, and the MoRA matrices of the current batch. Nothing is merged and the base is never
written to. In fp32 a row's result is that of its adapter merged alone, up to rounding.

    y_b = W0 x_b + bias + sum over the cycles of b's adapter, merged or not: decompress(M compress(x_b))

Rows whose adapters have the same operator in a cycle, as runs of one seed have, share one product.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.domains import update_rows
from mora_ds.adapters.layer import is_linear, linear_shape
from mora_ds.adapters.ops.index_tables import IndexTables, tables_of
from mora_ds.adapters.ops.mora import OperatorSpec, operator_of
from mora_ds.checkpoint.adapter_files import Adapter, AdapterFile, BaseReference, read_adapter
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_PARTS, adapter_folder, tokenizer_of
from mora_ds.commands.evaluate import TITLES, check_scoring, read_sets, score_cells, scoring_flags
from mora_ds.common.errors import UserError, nearest
from mora_ds.common.files import write_json_atomic
from mora_ds.common.tensor_files import compute_dtype
from mora_ds.data import load_tokenizer
from mora_ds.eval.perplexity import Score, Target, Windows, evaluate_sets
from mora_ds.models.attention import prefer_documents
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import load_model
from mora_ds.runtime.cli import command_parser, table

BASE = "(base)"
"""The name of the base model in tables of adapters."""

Adapters = str | Sequence[str | None]
"""One name for all rows, or one (None: the base alone) for each."""


# -- the adapters of a folder ------------------------------------------------------------------------------------------


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name -> folder with adapter.json, sorted by name. Raises `UserError` where there is none."""
    if not folder.is_dir():
        raise UserError(f"DIR: no such folder: {folder}")
    adapters = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # as of one that is being written
            continue
        adapter = adapter_folder(path)
        if adapter is not None or any((path / name).exists() for name in ADAPTER_PARTS):
            adapters[path.name] = adapter or path
    if not adapters:
        raise UserError(f"DIR: no folder in {folder} holds an adapter ({ADAPTER_JSON})")
    return adapters


def read_headers(name: str, folder: Path, fingerprint: str) -> AdapterFile:
    """adapter.json of an adapter. Raises `UserError` unless it belongs to the base with this fingerprint and has one
    MoRA matrix a layer and nothing else."""
    with naming(name):
        adapter = read_adapter(folder)
        reference = BaseReference.read(folder)
        if reference.fingerprint != fingerprint:
            raise UserError(
                f"it is of another base: fingerprint {reference.fingerprint}, not {fingerprint}; its base was "
                f"{(folder / reference.folder).resolve()}"
            )
        if reference.config_changes:
            raise UserError(f"its run changed {', '.join(reference.config_changes)} of the base: evaluate it alone")
        for layer, entry in adapter.layers.items():
            operator_of(entry.operator, layer)
        if adapter.domains is not None:
            raise UserError(
                f"it has MoRA matrices of the domains {', '.join(adapter.domains.names)} and shared ones; only "
                "adapters with one matrix a layer are served side by side: evaluate it with --domain"
            )
        if adapter.trainables:
            raise UserError(
                f"it also trained {adapter.trainables[0]}, which rows of one batch would have to share; evaluate it "
                "alone"
            )
    return adapter


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of the block name the adapter."""
    try:
        yield
    except UserError as error:
        raise UserError(f"adapter {name!r} cannot be used: {error}") from error


@dataclass(frozen=True)
class Resident:
    """An adapter in memory."""

    layers: dict[str, dict[OperatorSpec, Tensor]]
    """Layer -> operator of each cycle -> M. Cycles with one operator are summed; matrices of zeros are left out."""
    tables: list[IndexTables]
    """The operators' tables, which stay cached as long as they are held."""


def read_resident(
    name: str,
    folder: Path,
    expected: AdapterFile,
    dtype: torch.dtype,
    device: str,
) -> Resident:
    """Every MoRA matrix of an adapter, each byte of its files checked. Raises `UserError` for damaged files and for
    others than those whose headers were read."""
    layers: dict[str, dict[OperatorSpec, Tensor]] = {}
    with naming(name):
        adapter = Adapter.open(folder, adapter_only=True)
        if adapter.file != expected:
            raise UserError(f"{folder} has changed since the bank was opened")
        for layer, entry in adapter.file.layers.items():
            squares: dict[OperatorSpec, Tensor] = {}
            for spec, square in [*adapter.ledger.squares_of(layer), (entry.operator, adapter.tensors.square(layer))]:
                operator = operator_of(spec, layer)
                if not torch.isfinite(square).all():
                    raise UserError(f"a MoRA matrix of {layer} is not finite")
                if square.any():
                    squares[operator] = squares[operator] + square if operator in squares else square
            layers[layer] = {spec: square.to(device, dtype) for spec, square in squares.items()}
    tables = [tables_of(spec, torch.device(device)) for squares in layers.values() for spec in squares]
    return Resident(layers, tables)


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """What the adapters of a batch with the same operator add to one layer."""

    spec: OperatorSpec
    squares: Tensor
    """(U, R, R), each matrix once."""
    rows: Tensor
    """(n,) the rows that read them."""
    which: Tensor
    """(n,) index into `squares` for each of these rows."""

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, T, O) plus the updates for x (B, T, D)."""
        squares = self.squares.index_select(0, self.which).to(x.dtype)
        return y.index_add(
            0,
            self.rows,
            update_rows(self.spec, squares, x.index_select(0, self.rows)),
        )


class BankLinear(nn.Module):
    """y = W0 x + b plus the `terms` of the current batch. Replaces an `nn.Linear` or `Conv1D` and keeps its parameters
    under their names."""

    bias: nn.Parameter | None

    def __init__(self, base: Any, name: str) -> None:
        super().__init__()
        self.name = name
        self.transposed = isinstance(base, Conv1D)
        self.in_features, self.out_features = linear_shape(base)
        self.weight: nn.Parameter = base.weight
        self.register_parameter("bias", base.bias)
        self.terms: list[Term] = []
        self.rows: int | None = None
        """How many rows the terms are for; None: one adapter for any number of rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)
        if not self.terms:
            return y
        if self.rows is not None and (x.dim() < 3 or len(x) != self.rows):
            raise UserError(
                f"adapters are named for {self.rows} row(s), but {self.name} reads {tuple(x.shape)}; where it does not "
                "see complete rows, give all rows one adapter"
            )
        count = self.rows or 1
        rows = x.reshape(count, -1, self.in_features)
        result = y.reshape(count, -1, self.out_features)
        for term in self.terms:
            result = term.add(result, rows)
        return result.view(y.shape)


# -- the bank ----------------------------------------------------------------------------------------------------------


@dataclass
class AdapterBank:
    """A model with a folder of adapters. Create it with `AdapterBank.open`; one thread at a time may use it."""

    model: Any
    base: Path
    """The base's folder."""
    folders: dict[str, Path]
    """Name -> folder of every adapter, sorted by name."""
    files: dict[str, AdapterFile]
    """Name -> adapter.json; everything else is checked when the adapter is used."""
    layers: dict[str, BankLinear]
    dtype: torch.dtype
    device: str
    cache: int | None
    """How many adapters stay in memory after use; None: all."""
    residents: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    """Adapters in memory, the most recently used one last."""

    @classmethod
    def open(
        cls,
        base: Path | str,
        folder: Path | str,
        cache: int | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> AdapterBank:
        """Load the base, in evaluation mode, and the headers of every adapter; MoRA matrices when they are used.

        `base`: the model folder that all were trained on. `cache`: adapters that stay in memory after use; None: all.
        `dtype` "auto": the compute dtype of the adapters' runs if it is the same for all, else float32. Raises
        `UserError` naming an adapter that does not fit: of another base, of another kind of update, or with other
        trained tensors (modules_to_save).
        """
        if cache is not None and cache < 1:
            raise UserError(f"cache must be at least 1, got {cache}")
        opened = BaseCheckpoint.open(base, "MODEL")
        fingerprint = opened.fingerprint()
        folders = find_adapters(Path(folder))
        files = {name: read_headers(name, path, fingerprint) for name, path in folders.items()}
        dtypes = {adapter.dtype for adapter in files.values()}
        common = dtypes.pop() if len(dtypes) == 1 else "float32"
        chosen = compute_dtype(common if dtype == "auto" else dtype)
        model = load_model(opened.folder, chosen, None, trust_remote_code, "MODEL")
        model.requires_grad_(False).eval()
        layers = _replace_layers(model, files)
        return cls(
            model.to(device),
            opened.folder,
            folders,
            files,
            layers,
            chosen,
            device,
            cache,
        )

    def resident(self, name: str) -> Resident:
        """An adapter, read if it is not in memory. Raises `UserError` for an unknown name and a damaged adapter."""
        if name not in self.folders:
            raise UserError(f"there is no adapter {name!r}.{nearest(name, self.folders)}")
        resident = self.residents.pop(name, None)
        if resident is None:
            resident = read_resident(
                name,
                self.folders[name],
                self.files[name],
                self.dtype,
                self.device,
            )
        self.residents[name] = resident
        while self.cache is not None and len(self.residents) > self.cache:
            self.residents.popitem(last=False)
        return resident

    @contextmanager
    def use(self, adapters: Adapters) -> Iterator[None]:
        """Within the block every forward of `model` adds to each row the update of its adapter.

        `adapters`: a name for all rows, or a name (None: the base alone) for each row of the batches to come. Raises
        `UserError` for an unknown name or a damaged adapter, and for a batch with another number of rows.
        """
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        if not names:
            raise UserError("no adapter is named for any row")
        chosen = {name: self.resident(name) for name in dict.fromkeys(names) if name is not None}
        before = {name: (layer.rows, layer.terms) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.rows = None if isinstance(adapters, str) else len(names)
            layer.terms = _terms(names, {key: resident.layers.get(name, {}) for key, resident in chosen.items()})
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.rows, layer.terms = before[name]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, adapters: Adapters, **settings: Any) -> Any:
        """transformers' `generate` with an adapter for each row of `input_ids` (rows, tokens), and its return value.

        Rows that differ in length are padded on the left, with `attention_mask` among the settings. Raises `UserError`
        for another number of adapters than rows, and for settings that compute several sequences of a row.
        """
        if not isinstance(adapters, str) and len(adapters) != len(input_ids):
            raise UserError(f"adapters are named for {len(adapters)} row(s), but the batch has {len(input_ids)}")
        with self.use(adapters):
            return self.model.generate(input_ids, **settings)


def _replace_layers(model: Any, adapters: Mapping[str, AdapterFile]) -> dict[str, BankLinear]:
    """Replace every layer that some adapter has. Raises `UserError` where the base has none of its shape."""
    modules = dict(model.named_modules())
    layers: dict[str, BankLinear] = {}
    for adapter_name, adapter in adapters.items():
        for name, entry in adapter.layers.items():
            module = modules.get(name)
            shape = (entry.operator.d_in, entry.operator.d_out)
            if module is None or not is_linear(module) or linear_shape(module) != shape:
                raise UserError(
                    f"adapter {adapter_name!r}: the base has no linear layer {name} of {shape[0]} x {shape[1]}"
                )
            if name not in layers:
                layers[name] = BankLinear(module, name)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layers[name])
    return layers


def _terms(names: Sequence[str | None], adapters: Mapping[str, Mapping[OperatorSpec, Tensor]]) -> list[Term]:
    """What the adapters of all rows add to one layer. `adapters`: name -> the layer's matrices by their operators."""
    terms = []
    for spec in dict.fromkeys(spec for squares in adapters.values() for spec in squares):
        users = [name for name, squares in adapters.items() if spec in squares]
        squares = torch.stack([adapters[name][spec] for name in users])
        rows = [row for row, name in enumerate(names) if name in users]
        which = [users.index(str(names[row])) for row in rows]
        device = squares.device
        terms.append(
            Term(
                spec,
                squares,
                torch.tensor(rows, device=device),
                torch.tensor(which, device=device),
            )
        )
    return terms


# -- scores ------------------------------------------------------------------------------------------------------------


def main() -> None:
    options = _parser().parse_args()
    check_scoring(options)
    if not options.sets:
        raise UserError("nothing to evaluate on: give --sets NAME=PATH")
    sets = read_sets(options)
    bank = AdapterBank.open(
        options.model,
        options.folder,
        1,
        options.dtype,
        options.device,
        options.trust_remote_code,
    )
    windows = Windows.of(bank.model, options.window, options.stride, options.document_start)
    print(f"{len(bank.folders)} adapter(s) on {bank.base}; windows of {windows.window} tokens, stride {windows.stride}")
    tokenizer = load_tokenizer(
        bank.base,
        trust_remote_code=options.trust_remote_code,
        flag="MODEL",
    )
    model = prefer_documents(bank.model)

    def scored(name: str, its_tokenizer: Any) -> dict[str, Score]:
        target = Target(model, its_tokenizer, name)
        return evaluate_sets(
            target,
            sets,
            windows,
            options.batch_size,
            options.max_documents,
        )

    scores = {BASE: scored(BASE, tokenizer)}
    for name, adapter in bank.folders.items():
        folder = tokenizer_of(adapter)
        with bank.use(name):
            scores[name] = scored(name, tokenizer if folder is None else load_tokenizer(folder, flag=str(folder)))
    rows = [[adapter, *score_cells(*named)] for adapter, by_set in scores.items() for named in by_set.items()]
    print("\n".join(table([["adapter", *TITLES], *rows])))
    if options.json is not None:
        content = {
            "model": str(options.model), "adapters_of": str(options.folder),
            "window": windows.window, "stride": windows.stride,
            "adapters": {
                adapter: {name: score.to_dict() for name, score in by_set.items()} for adapter, by_set in scores.items()
            },
        }  # fmt: skip
        write_json_atomic(options.json, content)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="the base of all adapters",
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="a folder of adapters, checkpoints or runs",
    )
    scoring_flags(parser)
    return parser
