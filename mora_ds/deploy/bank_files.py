"""The adapters of a bank's folder: which there are, whether they belong together, and what each one reads into memory.

    bank/NAME/adapter.json, ...     an adapter (`portable.export_adapter`), a checkpoint, or a run's folder
    bank/team/NAME/...              folders in between are looked through; a name is the last folder's, and there once

When a bank is opened only adapter.json and base.json are read. What cannot be read then is kept for the moment that it
is asked for; what can be, and does not belong, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import OperatorKind, UpdateSpec
from mora_ds.checkpoint.adapter_files import AdapterFile, AdapterTensors, BaseReference, read_adapter
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_TENSORS, BASE_JSON, LEDGER_FOLDER, adapter_folder
from mora_ds.deploy.bank_layer import form_of, index_dtype, join_tables, term_square, term_tables
from mora_ds.errors import UserError
from mora_ds.files import MANIFEST, malformed, read_json, recorded_hashes, sha256_file, verify_manifest
from mora_ds.remora.ledger import LayerEntry, Ledger

_KINDS = tuple(
    kind.value for kind in (OperatorKind.TRUNCATE, OperatorKind.SHARE, OperatorKind.DECOUPLE, OperatorKind.ROTATE)
)
"""Whose update is tables of indices around a square: what `bank_layer.add_updates_` knows."""

_TRACES = (ADAPTER_JSON, ADAPTER_TENSORS, BASE_JSON, LEDGER_FOLDER)
"""What shows that a folder is, or was, an adapter."""


@dataclass(frozen=True)
class BankLayer:
    """What all adapters of a bank agree on at one layer."""

    form: OperatorSpec
    first: str
    """The adapter that said so."""


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name -> folder, by name. Raises `UserError` where there is none, and for two of one name."""
    if not folder.is_dir():
        raise UserError(f"--bank: no such folder: {folder}")
    found: dict[str, Path] = {}
    for path in _leaves(folder):
        if path.name in found:
            raise UserError(f"--bank: two adapters are called {path.name!r}: {found[path.name]} and {path}")
        found[path.name] = path
    if not found:
        raise UserError(f"--bank: no folder in {folder} holds an adapter ({ADAPTER_JSON})")
    return dict(sorted(found.items()))


def _leaves(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.name.startswith("."):  # one that is being written is hidden
            continue
        if adapter_folder(path) is not None or any((path / trace).exists() for trace in _TRACES):
            yield path
        else:
            yield from _leaves(path)


def read_headers(name: str, path: Path, fingerprint: str) -> AdapterFile:
    """adapter.json of an adapter of the base with this fingerprint. Raises `UserError` for what is damaged."""
    folder = _located(path)
    _refuse_unknown(name, folder)
    adapter, reference = read_adapter(folder), BaseReference.read(folder)
    if reference.fingerprint != fingerprint:
        raise NotOfThisBank(
            f"adapter {name!r} ({folder}) is of another base: fingerprint {reference.fingerprint}, not {fingerprint};"
            f" its own was {(folder / reference.folder).resolve()}"
        )
    if adapter.domains is not None:
        raise NotOfThisBank(
            f"adapter {name!r} ({folder}) has MoRA matrices of the domains {', '.join(adapter.domains.names)} and"
            " shared ones; a bank takes adapters with one matrix a layer: evaluate it alone, with --domain"
        )
    if adapter.trainables:
        raise NotOfThisBank(
            f"adapter {name!r} ({folder}) trained {adapter.trainables[0]}"
            + (f" and {len(adapter.trainables) - 1} more" if len(adapter.trainables) > 1 else "")
            + " beside its squares, which rows of one batch cannot have each for themselves; evaluate it alone"
        )
    return adapter


class NotOfThisBank(UserError):
    """An adapter that is whole, but cannot stand beside the others."""


def agree(name: str, layers: Mapping[str, LayerEntry], known: dict[str, BankLayer]) -> None:
    """Adds the layers of an adapter to the `known` ones. Raises `NotOfThisBank` where they are of another operator."""
    for layer, entry in layers.items():
        form = form_of(_known(name, layer, entry.operator))
        first = known.setdefault(layer, BankLayer(form, name))
        if form != first.form:
            raise NotOfThisBank(
                f"adapter {name!r}: {layer} has {_title(form)}, but {_title(first.form)} in {first.first!r}: a bank"
                " holds one operator and size, so that they can be multiplied together; give it a bank of its own"
            )


def _known(name: str, layer: str, spec: UpdateSpec) -> OperatorSpec:
    if type(spec) is not OperatorSpec or spec.kind.value not in _KINDS:
        raise _unknown(name, layer, spec.describe())
    return spec


def _unknown(name: str, layer: str, what: object) -> NotOfThisBank:
    return NotOfThisBank(f"adapter {name!r}: {layer} has {what}; a bank takes squares of {', '.join(_KINDS)}")


def _title(form: OperatorSpec) -> str:
    return f"{form.kind.value} of r_hat {form.r_hat} on {form.d_in} x {form.d_out}"


def _refuse_unknown(name: str, folder: Path) -> None:
    """A kind that this version, or a bank, does not know is no damage."""
    with malformed(folder / ADAPTER_JSON):
        kinds = {
            layer: entry["operator"]["kind"] for layer, entry in read_json(folder / ADAPTER_JSON)["layers"].items()
        }
    for layer, kind in kinds.items():
        if kind not in _KINDS:
            raise _unknown(name, layer, kind)


def _located(path: Path) -> Path:
    folder = adapter_folder(path)
    if folder is None:
        raise UserError(f"{path / ADAPTER_JSON} is missing")
    return folder


class Place(NamedTuple):
    """Where a layer's terms lie in a resident's tensors."""

    terms: int
    squares: int
    tables: int
    width: int
    """Of a term's tables: N * R + O."""


@dataclass(frozen=True)
class Resident:
    """An adapter in memory: two tensors, for thousands of small ones would weigh as much as what is in them."""

    squares: Tensor
    """All terms' squares, one behind the other."""
    tables: Tensor
    """All terms' tables (`bank_layer.term_tables`), as small integers: uint16, or int32 for layers too wide for it."""
    places: dict[str, Place]

    @property
    def nbytes(self) -> int:
        return self.squares.nbytes + self.tables.nbytes

    def of(self, layer: str, side: int) -> tuple[Tensor, Tensor] | None:
        """Views: squares (terms, side, side) and tables (terms, width). None where the layer has no term."""
        place = self.places.get(layer)
        if place is None:
            return None
        squares = self.squares.narrow(0, place.squares, place.terms * side * side)
        tables = self.tables.narrow(0, place.tables, place.terms * place.width)
        return squares.view(-1, side, side), tables.view(-1, place.width)


def read_resident(
    name: str, path: Path, fingerprint: str, layers: Mapping[str, BankLayer], dtype: torch.dtype, device: str
) -> Resident:
    """Every square of an adapter, its files checked byte by byte. Raises `UserError` that names it."""
    try:
        adapter = read_headers(name, path, fingerprint)
        folder = _located(path)
        ledger = _open_ledger(folder, fingerprint)
        adapter.check_cycle(ledger)
        tensors = AdapterTensors.open(folder, adapter)
        if new := set(adapter.layers) - set(layers):
            raise UserError(f"{folder / ADAPTER_JSON} has a layer that it did not have at first: {min(new)}")
        found = {
            layer: _terms(
                name, layer, [*ledger.squares_of(layer), (entry.operator, tensors.square(layer))], layers[layer].form
            )
            for layer, entry in adapter.layers.items()
        }
        return _packed(found, dtype, index_dtype(layer.form for layer in layers.values()), device)
    except NotOfThisBank:
        raise
    except UserError as error:
        raise UserError(f"adapter {name!r} cannot be used: {error}") from error


def _open_ledger(folder: Path, fingerprint: str) -> Ledger:
    """Of a checkpoint only what belongs to the adapter is hashed: the engine's shards are larger by far."""
    if not (folder / MANIFEST).exists():
        return Ledger.open(folder / LEDGER_FOLDER, fingerprint)
    problems = verify_manifest(folder, hashes=False)
    for name, sha256 in {} if problems else recorded_hashes(folder).items():
        if name.split("/")[0] in _TRACES and sha256_file(folder / name) != sha256:
            problems.append(f"{folder / name} is not as it was written")
    if problems:
        raise UserError("damaged: " + "; ".join(problems))
    return Ledger.open(folder / LEDGER_FOLDER, fingerprint, hashes=False)


def _terms(
    name: str, layer: str, updates: Iterable[tuple[UpdateSpec, Tensor]], form: OperatorSpec
) -> dict[OperatorSpec, Tensor]:
    """Squares that are wired alike, as without permutations, are one: deltas are linear in them. None that is zero."""
    found: dict[OperatorSpec, Tensor] = {}
    for any_spec, square in updates:
        spec = _known(name, layer, any_spec)
        if form_of(spec) != form:
            raise NotOfThisBank(
                f"adapter {name!r}: a merged cycle of {layer} has {_title(spec)}, but the bank {_title(form)}"
            )
        if not torch.isfinite(square).all():
            raise UserError(f"a square of {layer} is not finite")
        if square.any():
            found[spec] = found[spec] + square if spec in found else square
    return found


def _packed(
    found: Mapping[str, Mapping[OperatorSpec, Tensor]], dtype: torch.dtype, small: torch.dtype, device: str
) -> Resident:
    places: dict[str, Place] = {}
    tables: list[Tensor] = []
    squares_end = tables_end = 0
    for layer, terms in found.items():
        if not terms:
            continue
        form = form_of(next(iter(terms)))
        joined = join_tables(form, [torch.cat(term_tables(spec)).unsqueeze(0) for spec in terms])
        tables.append(joined.to(small).flatten())
        width = joined.shape[1]
        places[layer] = Place(len(terms), squares_end, tables_end, width)
        squares_end += len(terms) * form.r_hat**2
        tables_end += len(terms) * width
    squares = torch.empty(squares_end, dtype=dtype)
    for layer, place in places.items():
        for index, (spec, square) in enumerate(found[layer].items()):
            start, square = place.squares + index * square.numel(), term_square(spec, square)
            squares.narrow(0, start, square.numel()).view(square.shape).copy_(square)
    indices = torch.cat(tables) if tables else torch.empty(0, dtype=small)
    return Resident(squares.to(device), indices.to(device), places)
