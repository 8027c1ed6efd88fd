"""Score many adapters of one base in one process, and serve them side by side: each row of a batch with its own.

    mora-ds evaluate-adapters MODEL DIR --sets held=held.jsonl [--adapters law code] [--cache 8]

    bank = AdapterBank.open(MODEL, DIR, cache=32)
    with bank.use(["law", "code", None]):            one for each row; None: the base alone
        logits = bank.model(input_ids=ids).logits
    bank.generate(ids, adapters=["law", "code", "law"], max_new_tokens=20)

DIR holds adapters by their names (`adapter_io.export_adapter`), checkpoints or folders of runs; folders in between are
searched. In memory are the base once, the adapters used last, and the MoRA matrices of the current batch. Nothing is
merged and the base is never written to. In fp32 a row's result is that of its adapter merged alone, up to rounding.

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
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.checkpoint.adapter_files import Adapter, AdapterFile, BaseReference, read_adapter
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_PARTS, adapter_folder, has_adapter, tokenizer_of
from mora_ds.commands.evaluate import check_scoring, read_sets, scoring_flags
from mora_ds.common.errors import UserError, nearest
from mora_ds.common.files import write_json_atomic
from mora_ds.data import load_tokenizer
from mora_ds.eval.perplexity import Score, Target, Windows, evaluate_sets
from mora_ds.models.attention import prefer_documents
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import load_model
from mora_ds.models.tensor_files import compute_dtype
from mora_ds.runtime.cli import command_parser, table

BASE = "(base)"
"""The name of the base model in tables of adapters."""

Adapters = str | Sequence[str | None]
"""One name for all rows, or one (None: the base alone) for each."""


class DoesNotFit(UserError):
    """An adapter that is intact, but cannot be served beside others."""


# -- the adapters of a folder ------------------------------------------------------------------------------------------


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name -> folder, sorted by name. Raises `UserError` where there is none, and for two of one name."""
    if not folder.is_dir():
        raise UserError(f"DIR: no such folder: {folder}")
    folders: dict[str, Path] = {}
    for path in _adapters_below(folder, set()):
        if path.name in folders:
            raise UserError(f"DIR: two adapters are called {path.name!r}: {folders[path.name]} and {path}")
        folders[path.name] = path
    if not folders:
        raise UserError(f"DIR: no folder in {folder} holds an adapter ({ADAPTER_JSON})")
    return dict(sorted(folders.items()))


def _adapters_below(folder: Path, searched: set[Path]) -> Iterator[Path]:
    """`searched`: folders by resolved path. Links are followed, and may form a loop."""
    if (resolved := folder.resolve()) in searched:
        return
    searched.add(resolved)
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):  # a folder that is being written is hidden
            continue
        if has_adapter(path) or any((path / part).exists() for part in ADAPTER_PARTS):
            yield path
        else:
            yield from _adapters_below(path, searched)


def read_headers(name: str, path: Path, fingerprint: str) -> AdapterFile:
    """adapter.json of an adapter. Raises `DoesNotFit` unless it belongs to the base with this fingerprint and has one
    MoRA matrix a layer and nothing else; another `UserError` where it is damaged."""
    folder = adapter_folder(path) or path
    adapter = read_adapter(folder)
    reference = BaseReference.read(folder)
    if reference.fingerprint != fingerprint:
        raise DoesNotFit(
            f"adapter {name!r} ({folder}) is of another base: fingerprint {reference.fingerprint}, not {fingerprint};"
            f" its base was {(folder / reference.folder).resolve()}"
        )
    for layer, entry in adapter.layers.items():
        _require_operator(name, layer, entry.operator)
    if adapter.domains is not None:
        raise DoesNotFit(
            f"adapter {name!r} ({folder}) has MoRA matrices of the domains {', '.join(adapter.domains.names)} and"
            " shared ones; only adapters with one matrix a layer are served side by side: evaluate it with --domain"
        )
    if adapter.trainables:
        raise DoesNotFit(
            f"adapter {name!r} ({folder}) also trained {adapter.trainables[0]}, which rows of one batch would have to"
            " share; evaluate it alone"
        )
    return adapter


def _require_operator(name: str, layer: str, spec: UpdateSpec) -> OperatorSpec:
    if not isinstance(spec, OperatorSpec):
        raise DoesNotFit(
            f"adapter {name!r}: {layer} has {spec.describe()}; the operators truncate, share, decouple and rotate are"
            " served side by side"
        )
    return spec


@dataclass(frozen=True)
class Resident:
    """An adapter in memory."""

    layers: dict[str, dict[OperatorSpec, Tensor]]
    """Layer -> operator of each cycle -> M. Cycles with one operator are summed; matrices of zeros are left out."""
    tables: list[IndexTables]
    """The operators' tables, which stay cached as long as they are held."""


def read_resident(name: str, path: Path, fingerprint: str, dtype: torch.dtype, device: str) -> Resident:
    """Every MoRA matrix of an adapter, each byte of its files checked. Raises `UserError` that names the adapter."""
    try:
        read_headers(name, path, fingerprint)
        folder = adapter_folder(path) or path
        adapter = Adapter.open(folder, adapter_only=True)
        layers: dict[str, dict[OperatorSpec, Tensor]] = {}
        for layer, entry in adapter.file.layers.items():
            squares: dict[OperatorSpec, Tensor] = {}
            updates = [*adapter.ledger.squares_of(layer), (entry.operator, adapter.tensors.square(layer))]
            for any_spec, square in updates:
                spec = _require_operator(name, layer, any_spec)
                if not torch.isfinite(square).all():
                    raise UserError(f"a MoRA matrix of {layer} is not finite")
                if square.any():
                    squares[spec] = squares[spec] + square if spec in squares else square
            layers[layer] = {spec: square.to(device, dtype) for spec, square in squares.items()}
    except DoesNotFit:
        raise
    except UserError as error:
        raise UserError(f"adapter {name!r} cannot be used: {error}") from error
    tables = [tables_of(spec, torch.device(device)) for squares in layers.values() for spec in squares]
    return Resident(layers, tables)


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """The rows that adapters are named for, and the shape of the model's current input."""

    rows: int | None
    """None: one adapter for any number of rows."""
    expands: bool
    """Whether each row may have become several consecutive ones (beams)."""
    shape: tuple[int, int] = (0, 0)
    """(rows, tokens) of the model's input."""

    def see(self, rows: int, tokens: int) -> None:
        """Note the next input. Raises `UserError` unless it has as many rows as adapters are named for."""
        if self.rows is not None and rows != self.rows and not (self.expands and rows % self.rows == 0):
            raise UserError(f"adapters are named for {self.rows} row(s), but the batch has {rows}")
        self.shape = (rows, tokens)


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

    def add(self, y: Tensor, x: Tensor, beams: int) -> Tensor:
        """y (B, T, O) plus the updates for x (B, T, D); each row stands for `beams` consecutive ones."""
        places = (self.rows * beams).unsqueeze(1) + torch.arange(beams, device=y.device)
        rows = places.flatten()
        squares = self.squares.index_select(0, self.which.repeat_interleave(beams)).to(x.dtype)
        return y.index_add(0, rows, update_rows(self.spec, squares, x.index_select(0, rows)))


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
        self.batch = Batch(None, expands=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)
        if not self.terms:
            return y
        rows, tokens = self.batch.shape
        named = self.batch.rows
        if named is None:
            rows = named = 1
        elif x.shape[:-1].numel() != rows * tokens:
            raise UserError(
                f"{self.name} gets {tuple(x.shape)} of a batch of {self.batch.shape}: its rows cannot be separated, so"
                " adapters cannot be mixed here; give all rows one adapter"
            )
        result = y.reshape(rows, -1, self.out_features)
        for term in self.terms:
            result = term.add(result, x.reshape(rows, -1, self.in_features), rows // named)
        return result.view(y.shape)


# -- the bank ----------------------------------------------------------------------------------------------------------


@dataclass
class AdapterBank:
    """A model with a folder of adapters. Create it with `AdapterBank.open`; one thread at a time may use it."""

    model: Any
    base: Path
    """The base's folder."""
    fingerprint: str
    folders: dict[str, Path]
    """Name -> folder of every adapter, sorted by name."""
    damaged: dict[str, str]
    """Name -> problem of adapters whose headers could not be read; the others are checked when they are used."""
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
        `UserError` naming an adapter that does not fit: of another base, of another kind of update, with other trained
        tensors (modules_to_save), or with a name that occurs twice.
        """
        if cache is not None and cache < 1:
            raise UserError(f"cache must be at least 1, got {cache}")
        opened = BaseCheckpoint.open(base, "MODEL")
        fingerprint = opened.fingerprint()
        folders = find_adapters(Path(folder))
        adapters: dict[str, AdapterFile] = {}
        damaged: dict[str, str] = {}
        for name, path in folders.items():
            try:
                adapters[name] = read_headers(name, path, fingerprint)
            except DoesNotFit:
                raise
            except UserError as error:
                damaged[name] = str(error)
        if not adapters:
            raise UserError(f"DIR: every adapter is damaged, e.g. {next(iter(damaged.values()))}")
        dtypes = {adapter.dtype for adapter in adapters.values()}
        common = dtypes.pop() if len(dtypes) == 1 else "float32"
        chosen = compute_dtype(common if dtype == "auto" else dtype)
        model = load_model(opened.folder, chosen, None, trust_remote_code, "MODEL")
        model.requires_grad_(False).eval()
        layers = _replace_layers(model, adapters)
        bank = cls(
            model.to(device), opened.folder, fingerprint, folders, damaged, layers, chosen, device, cache
        )  # fmt: skip
        model.register_forward_pre_hook(bank._see_batch, with_kwargs=True)
        return bank

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, sorted."""
        return tuple(self.folders)

    def resident(self, name: str) -> Resident:
        """An adapter, read if it is not in memory. Raises `UserError` for an unknown name and a damaged adapter."""
        if name not in self.folders:
            raise UserError(f"there is no adapter {name!r}.{nearest(name, self.names)}")
        if name not in self.residents:
            resident = read_resident(name, self.folders[name], self.fingerprint, self.dtype, self.device)
            if new := set(resident.layers) - set(self.layers):
                raise UserError(f"adapter {name!r} cannot be used: it has a layer that it did not have: {min(new)}")
            self.residents[name] = resident
        self.residents.move_to_end(name)
        resident = self.residents[name]
        while self.cache is not None and len(self.residents) > self.cache:
            self.residents.popitem(last=False)
        return resident

    @contextmanager
    def use(self, adapters: Adapters, expands: bool = False) -> Iterator[None]:
        """Within the block every forward of `model` adds to each row the update of its adapter.

        `adapters`: a name for all rows, or a name (None: the base alone) for each row of the batches to come; with
        `expands` each row may become several consecutive ones. Raises `UserError` for an unknown name or a damaged
        adapter, and for a batch with another number of rows.
        """
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        if not names:
            raise UserError("no adapter is named for any row")
        batch = Batch(None if isinstance(adapters, str) else len(names), expands)
        chosen = {name: self.resident(name) for name in dict.fromkeys(names) if name is not None}
        before = {name: (layer.batch, layer.terms) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            layer.batch = batch
            layer.terms = _terms(names, {adapter: each.layers.get(name, {}) for adapter, each in chosen.items()})
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.batch, layer.terms = before[name]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, adapters: Adapters, **settings: Any) -> Any:
        """transformers' `generate` with an adapter for each row of `input_ids` (rows, tokens), and its return value.

        Rows that differ in length are padded on the left, with `attention_mask` among the settings. Beams and
        `num_return_sequences` use the adapter of their row.
        """
        if not isinstance(adapters, str) and len(adapters) != len(input_ids):
            raise UserError(f"adapters are named for {len(adapters)} row(s), but the batch has {len(input_ids)}")
        with self.use(adapters, expands=True):
            return self.model.generate(input_ids, **settings)

    def _see_batch(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        tensor = next((each for each in inputs if isinstance(each, Tensor)), None)
        if tensor is not None:
            batch = next(iter(self.layers.values())).batch
            batch.see(tensor.shape[0], tensor.shape[1])


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
        terms.append(Term(spec, squares, torch.tensor(rows, device=device), torch.tensor(which, device=device)))
    return terms


# -- scores ------------------------------------------------------------------------------------------------------------


def main() -> None:
    given = _parser().parse_args()
    check_scoring(given)
    if not given.sets:
        raise UserError("nothing to evaluate on: give --sets NAME=PATH")
    if given.cache < 1:
        raise UserError(f"--cache must be at least 1, got {given.cache}")
    sets = read_sets(given)
    bank = AdapterBank.open(
        given.model, given.folder, given.cache, given.dtype, given.device, trust_remote_code=given.trust_remote_code
    )
    chosen = given.adapters or bank.names
    for name in chosen:
        if name in bank.damaged:
            raise UserError(f"adapter {name!r} cannot be used: {bank.damaged[name]}")
        if name not in bank.folders:
            raise UserError(f"--adapters: there is no adapter {name!r}.{nearest(name, bank.names)}")
    windows = Windows.of(bank.model, given.window, given.stride, given.document_start)
    print(f"{len(chosen)} adapter(s) on {bank.base}; windows of {windows.window} tokens, stride {windows.stride}")
    tokenizer = load_tokenizer(bank.base, trust_remote_code=given.trust_remote_code, flag="MODEL")
    model = prefer_documents(bank.model)
    scores: dict[str, dict[str, Score]] = {}
    scores[BASE] = evaluate_sets(Target(model, tokenizer, BASE), sets, windows, given.batch_size, given.max_documents)
    for name in chosen:
        own = tokenizer_of(adapter_folder(bank.folders[name]) or bank.folders[name])
        target = Target(model, tokenizer if own is None else load_tokenizer(own, flag=str(own)), name)
        with bank.use(name):
            scores[name] = evaluate_sets(target, sets, windows, given.batch_size, given.max_documents)
    print("\n".join(table(_rows(scores))))
    if given.json is not None:
        content = {name: {each: score.to_dict() for each, score in found.items()} for name, found in scores.items()}
        facts: dict[str, Any] = {"model": str(given.model), "adapters_of": str(given.folder)}
        write_json_atomic(
            given.json, {**facts, "window": windows.window, "stride": windows.stride, "adapters": content}
        )


def _rows(scores: Mapping[str, Mapping[str, Score]]) -> list[list[str]]:
    """Rows of a table: titles, then a line an adapter with perplexity and bits per byte of every set."""
    titles = [f"{name}: {figure}" for name in scores[BASE] for figure in ("perplexity", "bits/byte")]
    rows = [["adapter", *titles]]
    for adapter, sets in scores.items():
        figures = [figure for score in sets.values() for figure in (score.perplexity, score.bits_per_byte)]
        rows.append([adapter, *(f"{figure:.4f}" for figure in figures)])
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the base of all adapters")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of adapters, checkpoints or runs")
    parser.add_argument("--adapters", nargs="+", metavar="NAME", help="only these of them")
    parser.add_argument("--cache", type=int, default=1, metavar="N", help="adapters that stay in memory")
    scoring_flags(parser)
    return parser
