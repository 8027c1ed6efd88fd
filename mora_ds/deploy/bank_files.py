"""The adapters of a bank's folder: which there are, whether they fit together, and what each one reads into memory.

    bank/NAME/adapter.json, ...     an adapter (`adapter_io.export_adapter`), a checkpoint, or a run's folder
    bank/team/NAME/...              folders in between are searched; the last folder's name must be unique

Opening a bank reads adapter.json and base.json only. An adapter that cannot be read is reported when it is used; one
that can be read and does not fit is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import OperatorKind, UpdateSpec
from mora_ds.checkpoint.adapter_files import AdapterFile, AdapterTensors, BaseReference, open_adapter, read_adapter
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_PARTS, adapter_folder, has_adapter
from mora_ds.common.errors import UserError
from mora_ds.common.files import malformed, read_json
from mora_ds.common.untrusted import FileName, entry, typed
from mora_ds.deploy.bank_layer import form_of, index_dtype, join_tables, paired, term_tables
from mora_ds.remora.ledger import LayerEntry

_KINDS = tuple(
    kind.value for kind in (OperatorKind.TRUNCATE, OperatorKind.SHARE, OperatorKind.DECOUPLE, OperatorKind.ROTATE)
)
"""Operators whose update is index tables around a matrix, which is what `bank_layer.add_updates_` computes."""


class DoesNotFit(UserError):
    """An adapter that is intact, but cannot be used together with the others."""


@dataclass(frozen=True)
class BankLayer:
    """What all adapters of a bank have in common at one layer."""

    form: OperatorSpec
    first: str
    """The first adapter with this layer, for error messages."""


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name -> folder, sorted by name. Raises `UserError` where there is none, and for two of one name."""
    if not folder.is_dir():
        raise UserError(f"--bank: no such folder: {folder}")
    folders: dict[str, Path] = {}
    for path in _leaves(folder, set()):
        if path.name in folders:
            raise UserError(f"--bank: two adapters are called {path.name!r}: {folders[path.name]} and {path}")
        folders[path.name] = path
    if not folders:
        raise UserError(f"--bank: no folder in {folder} holds an adapter ({ADAPTER_JSON})")
    return dict(sorted(folders.items()))


def _leaves(folder: Path, searched: set[Path]) -> Iterator[Path]:
    """`searched`: folders by resolved path. Links are followed, for a bank may consist of them, and may form a loop."""
    if (resolved := folder.resolve()) in searched:
        return
    searched.add(resolved)
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):  # a folder that is being written is hidden
            continue
        if has_adapter(path) or any((path / part).exists() for part in ADAPTER_PARTS):
            yield path
        else:
            yield from _leaves(path, searched)


def read_headers(name: str, path: Path, fingerprint: str) -> AdapterFile:
    """adapter.json of an adapter. Raises `DoesNotFit` unless it belongs to the base with this fingerprint and has one
    MoRA matrix a layer and nothing else; another `UserError` where it is damaged."""
    folder = adapter_folder(path) or path
    path = folder / ADAPTER_JSON
    with malformed(path):
        layers = entry(read_json(path), "layers", dict[FileName, dict[str, Any]], path)
        kinds = {layer: typed(str, each["operator"]["kind"], path) for layer, each in layers.items()}
    for layer, kind in kinds.items():  # before `read_adapter`, to which an unknown kind is damage
        if kind not in _KINDS:
            raise _other_operator(name, layer, kind)
    adapter, reference = read_adapter(folder), BaseReference.read(folder)
    if reference.fingerprint != fingerprint:
        raise DoesNotFit(
            f"adapter {name!r} ({folder}) is of another base: fingerprint {reference.fingerprint}, not {fingerprint};"
            f" its base was {(folder / reference.folder).resolve()}"
        )
    if adapter.domains is not None:
        raise DoesNotFit(
            f"adapter {name!r} ({folder}) has MoRA matrices of the domains {', '.join(adapter.domains.names)} and"
            " shared ones; a bank takes adapters with one matrix a layer: evaluate it alone, with --domain"
        )
    if adapter.trainables:
        raise DoesNotFit(
            f"adapter {name!r} ({folder}) also trained {adapter.trainables[0]}"
            + (f" and {len(adapter.trainables) - 1} more tensors" if len(adapter.trainables) > 1 else "")
            + " (modules_to_save), which rows of one batch would have to share; evaluate it alone"
        )
    return adapter


def agree(name: str, layers: Mapping[str, LayerEntry], known: dict[str, BankLayer]) -> None:
    """Adds the layers of an adapter to the `known` ones. Raises `DoesNotFit` where they have another operator."""
    for layer, each in layers.items():
        form = form_of(_supported(name, layer, each.operator))
        first = known.setdefault(layer, BankLayer(form, name))
        if form != first.form:
            raise DoesNotFit(
                f"adapter {name!r}: {layer} has {_title(form)}, but {_title(first.form)} in {first.first!r}: a bank"
                " holds one operator and size, so that they can be multiplied together; put it into another bank"
            )


def _supported(name: str, layer: str, spec: UpdateSpec) -> OperatorSpec:
    if type(spec) is not OperatorSpec or spec.kind.value not in _KINDS:
        raise _other_operator(name, layer, spec.describe())
    return spec


def _other_operator(name: str, layer: str, operator: str) -> DoesNotFit:
    return DoesNotFit(f"adapter {name!r}: {layer} has {operator}; a bank takes the operators {', '.join(_KINDS)}")


def _title(form: OperatorSpec) -> str:
    return f"{form.kind.value} of r_hat {form.r_hat} on {form.d_in} x {form.d_out}"


class TermSlices(NamedTuple):
    """Where a layer's terms are in the tensors of a `Resident`."""

    terms: int
    squares: int
    """Offset of the first matrix."""
    tables: int
    """Offset of the first table."""
    width: int
    """Length of a term's table, N * R + O."""


@dataclass(frozen=True)
class Resident:
    """An adapter in memory, in two tensors: thousands of small ones would take as much memory as their contents."""

    squares: Tensor
    """Matrices of all terms, one after the other."""
    tables: Tensor
    """Tables of all terms (`bank_layer.term_tables`): uint16, or int32 for layers that are too wide for it."""
    slices: dict[str, TermSlices]

    @property
    def nbytes(self) -> int:
        return self.squares.nbytes + self.tables.nbytes

    def of(self, layer: str, side: int) -> tuple[Tensor, Tensor] | None:
        """Views: matrices (terms, side, side) and tables (terms, width). None where the layer has no term."""
        at = self.slices.get(layer)
        if at is None:
            return None
        squares = self.squares.narrow(0, at.squares, at.terms * side * side)
        tables = self.tables.narrow(0, at.tables, at.terms * at.width)
        return squares.view(-1, side, side), tables.view(-1, at.width)


def read_resident(
    name: str, path: Path, fingerprint: str, layers: Mapping[str, BankLayer], dtype: torch.dtype, device: str
) -> Resident:
    """Every MoRA matrix of an adapter, each byte of its files checked. Raises `UserError` that names the adapter."""
    try:
        read_headers(name, path, fingerprint)
        folder = adapter_folder(path) or path
        adapter, ledger = open_adapter(folder, adapter_only=True)
        tensors = AdapterTensors.open(folder, adapter)
        if new := set(adapter.layers) - set(layers):
            raise UserError(f"{folder / ADAPTER_JSON} has a layer that it did not have at first: {min(new)}")
        terms = {}
        for layer, each in adapter.layers.items():
            updates = [*ledger.squares_of(layer), (each.operator, tensors.square(layer))]
            terms[layer] = _terms(name, layer, updates, layers[layer].form)
        return _packed(terms, dtype, index_dtype(layer.form for layer in layers.values()), device)
    except DoesNotFit:
        raise
    except UserError as error:
        raise UserError(f"adapter {name!r} cannot be used: {error}") from error


def _terms(
    name: str, layer: str, updates: Iterable[tuple[UpdateSpec, Tensor]], form: OperatorSpec
) -> dict[OperatorSpec, Tensor]:
    """Matrix of each distinct operator. Updates of one operator (without permutations all cycles) are summed, as deltas
    are linear in the matrix; zeros are left out."""
    terms: dict[OperatorSpec, Tensor] = {}
    for any_spec, square in updates:
        spec = _supported(name, layer, any_spec)
        if form_of(spec) != form:
            raise DoesNotFit(
                f"adapter {name!r}: a merged cycle of {layer} has {_title(spec)}, but the bank {_title(form)}"
            )
        if not torch.isfinite(square).all():
            raise UserError(f"a MoRA matrix of {layer} is not finite")
        if square.any():
            terms[spec] = terms[spec] + square if spec in terms else square
    return terms


def _packed(
    layers: Mapping[str, Mapping[OperatorSpec, Tensor]], dtype: torch.dtype, table_dtype: torch.dtype, device: str
) -> Resident:
    slices: dict[str, TermSlices] = {}
    tables: list[Tensor] = []
    squares_end = tables_end = 0
    for layer, terms in layers.items():
        if not terms:
            continue
        form = form_of(next(iter(terms)))
        joined = join_tables(form, [torch.cat(term_tables(spec)).unsqueeze(0) for spec in terms])
        tables.append(joined.to(table_dtype).flatten())
        slices[layer] = TermSlices(len(terms), squares_end, tables_end, joined.shape[1])
        squares_end += len(terms) * form.r_hat**2
        tables_end += joined.numel()
    squares = torch.empty(squares_end, dtype=dtype)
    for layer, at in slices.items():
        for index, (spec, square) in enumerate(layers[layer].items()):
            start = at.squares + index * square.numel()
            squares.narrow(0, start, square.numel()).view(square.shape).copy_(paired(spec, square))
    indices = torch.cat(tables) if tables else torch.empty(0, dtype=table_dtype)
    return Resident(squares.to(device), indices.to(device), slices)
