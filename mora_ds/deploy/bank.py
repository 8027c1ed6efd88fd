"""Multi-adapter inference: hundreds of adapters over one base in one process, chosen for each row of a batch.

    bank = AdapterBank.open(base, folder, cache_adapters=32)
    with bank.use(["law", "code", None]):            one for each row; None: the base alone
        logits = bank.model(input_ids=ids).logits
    bank.generate(ids, adapters=["law", "code", "law"], max_new_tokens=20)

In memory are the base once, the most recently used adapters within a bound, and the MoRA matrices of the current batch.
Nothing is merged and the base is never written to (`bank_layer`). In fp32 a row's result is that of its adapter merged
alone, up to rounding. A model merged in bf16 has rounded weights, and so has a run with --base_bits; a bank has not.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.layer import is_linear, linear_shape
from mora_ds.checkpoint.adapter_files import AdapterFile
from mora_ds.common.errors import UserError, nearest
from mora_ds.deploy.bank_files import (
    BankLayer,
    DoesNotFit,
    Resident,
    agree,
    find_adapters,
    read_headers,
    read_resident,
)
from mora_ds.deploy.bank_layer import BankLinear, Rows, stack_terms
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import load_model
from mora_ds.models.tensor_files import compute_dtype

Adapters = str | Sequence[str | None]
"""One name for all rows, or one (None: the base alone) for each."""


class ResidentCache:
    """The most recently used adapters, at most `adapters` of them and `nbytes` bytes; None: no bound."""

    def __init__(self, read: Callable[[str], Resident], adapters: int | None, nbytes: int | None) -> None:
        for value, flag in ((adapters, "cache_adapters"), (nbytes, "cache_bytes")):
            if value is not None and value < 1:
                raise UserError(f"{flag} must be at least 1, got {value}")
        self._read, self._adapters, self._nbytes = read, adapters, nbytes
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self.reads = 0
        """Number of times that an adapter was read from disk."""

    def get(self, name: str) -> Resident:
        """An adapter, read if necessary. One that is larger than `nbytes` is not kept."""
        if name in self._residents:
            self._residents.move_to_end(name)
            return self._residents[name]
        resident = self._read(name)
        self.reads += 1
        if self._nbytes is None or resident.nbytes <= self._nbytes:
            self._residents[name] = resident
        while (self._adapters is not None and len(self._residents) > self._adapters) or (
            self._nbytes is not None and self.nbytes > self._nbytes
        ):
            self._residents.popitem(last=False)
        return resident

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters in memory, the most recently used one last."""
        return tuple(self._residents)

    @property
    def nbytes(self) -> int:
        return sum(resident.nbytes for resident in self._residents.values())


class AdapterBank:
    """A model with a folder of adapters. Create it with `AdapterBank.open`; one thread at a time may use it."""

    def __init__(
        self,
        model: Any,
        base: Path,
        folders: Mapping[str, Path],
        layers: Mapping[str, BankLinear],
        forms: Mapping[str, BankLayer],
        damaged: Mapping[str, str],
        cache: ResidentCache,
    ) -> None:
        self.model = model
        self.base = base
        """The base's folder."""
        self.folders = dict(folders)
        """Name -> folder of every adapter, sorted by name."""
        self.damaged = dict(damaged)
        """Name -> problem of adapters whose headers could not be read; the others are checked when they are used."""
        self.cache = cache
        self._layers, self._forms = dict(layers), dict(forms)
        self._rows: Rows | None = None
        model.register_forward_pre_hook(self._see_batch, with_kwargs=True)

    @classmethod
    def open(
        cls,
        base: Path | str,
        folder: Path | str,
        cache_adapters: int | None = None,
        cache_bytes: int | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> AdapterBank:
        """Loads the base, in evaluation mode, and the headers of every adapter; MoRA matrices when they are used.

        `base`: the model folder that all were trained on. `folder`: see `bank_files`. `cache_adapters`, `cache_bytes`:
        bounds of what stays in memory after use; None: no bound. `dtype` "auto": the compute dtype of the adapters'
        runs if it is the same for all, else float32. Raises `UserError` naming an adapter that does not fit: of another
        base, of another operator or size, with other trained tensors (modules_to_save), or with a name that occurs
        twice.
        """
        opened = BaseCheckpoint.open(base, "MODEL")
        paths = find_adapters(Path(folder))
        adapters, damaged = _headers(paths, opened.fingerprint())
        forms: dict[str, BankLayer] = {}
        for name, adapter in adapters.items():
            agree(name, adapter.layers, forms)
        if dtype == "auto":
            dtypes = {adapter.dtype for adapter in adapters.values()}
            dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        chosen = compute_dtype(dtype)
        model = load_model(opened.folder, chosen, attn_implementation, trust_remote_code, "MODEL")
        model.requires_grad_(False).eval()

        def read(name: str) -> Resident:
            return read_resident(name, paths[name], opened.fingerprint(), forms, chosen, device)

        cache = ResidentCache(read, cache_adapters, cache_bytes)
        layers = _replace_layers(model, forms)
        return cls(model.to(device), opened.folder, paths, layers, forms, damaged, cache)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, sorted."""
        return tuple(self.folders)

    @contextmanager
    def use(self, adapters: Adapters) -> Iterator[None]:
        """Within the block every forward of `model` adds to each row the update of its adapter.

        `adapters`: a name for all rows, or a name (None: the base alone) for each row of the batches to come. Raises
        `UserError` for an unknown name or a damaged adapter, and for a batch with another number of rows.
        """
        with self._using(adapters, expands=False):
            yield

    @torch.no_grad()
    def generate(self, input_ids: Tensor, adapters: Adapters, **settings: Any) -> Any:
        """transformers' `generate` with an adapter for each row of `input_ids` (rows, tokens), and its return value.

        Rows that differ in length are padded on the left, with `attention_mask` among the settings. Beams and
        `num_return_sequences` use the adapter of their row.
        """
        if not isinstance(adapters, str) and len(adapters) != len(input_ids):
            raise UserError(f"adapters are named for {len(adapters)} row(s), but the batch has {len(input_ids)}")
        with self._using(adapters, expands=True):
            return self.model.generate(input_ids, **settings)

    @contextmanager
    def _using(self, adapters: Adapters, expands: bool) -> Iterator[None]:
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        if not names:
            raise UserError("no adapter is named for any row")
        groups = _groups(names)
        rows = Rows(len(groups), None if isinstance(adapters, str) else len(names), expands)
        terms = self._terms_of(rows, groups)
        before = self._rows, {name: layer.terms for name, layer in self._layers.items()}
        self._rows = rows
        for name, layer in self._layers.items():
            layer.terms = terms[name]
        try:
            yield
        finally:
            self._rows, terms = before
            for name, layer in self._layers.items():
                layer.terms = terms[name]

    @torch.no_grad()
    def _terms_of(self, rows: Rows, groups: Sequence[str | None]) -> dict[str, Any]:
        distinct = list(dict.fromkeys(name for name in groups if name is not None))
        self.check_names(distinct)
        of = [-1 if name is None else distinct.index(name) for name in groups]
        cached = self.cache.names  # first, before reading others drops them
        residents = {name: self.cache.get(name) for name in sorted(distinct, key=lambda name: name not in cached)}
        return {
            layer: stack_terms(known.form, rows, [residents[name].of(layer, known.form.r_hat) for name in distinct], of)
            for layer, known in self._forms.items()
        }

    def check_names(self, names: Sequence[str]) -> None:
        """Raises `UserError` for a name that the bank does not have."""
        for name in names:
            if name not in self.folders:
                raise UserError(f"the bank has no adapter {name!r}.{nearest(name, self.names)}")

    def _see_batch(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rows is None:
            return
        inputs = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        if (tensor := next((each for each in inputs if isinstance(each, Tensor)), None)) is not None:
            self._rows.set_batch(tensor.shape[0], tensor.shape[1])


def _headers(paths: Mapping[str, Path], fingerprint: str) -> tuple[dict[str, AdapterFile], dict[str, str]]:
    """Headers of all adapters, and the problems of those that are damaged."""
    adapters, damaged = {}, {}
    for name, path in paths.items():
        try:
            adapters[name] = read_headers(name, path, fingerprint)
        except DoesNotFit:
            raise
        except UserError as error:
            damaged[name] = str(error)
    if not adapters:
        raise UserError(f"--bank: every adapter is damaged, e.g. {damaged[min(damaged)]}")
    return adapters, damaged


def _replace_layers(model: Any, forms: Mapping[str, BankLayer]) -> dict[str, BankLinear]:
    modules = dict(model.named_modules())
    layers = {}
    for name, known in forms.items():
        module = modules.get(name)
        if module is None or not is_linear(module) or linear_shape(module) != (known.form.d_in, known.form.d_out):
            shape = f"{known.form.d_in} x {known.form.d_out}"
            raise UserError(f"adapter {known.first!r}: the base has no linear layer {name} of {shape}")
        layers[name] = BankLinear(module, name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


def _groups(names: Sequence[str | None]) -> list[str | None]:
    """The adapter of each group of neighbouring rows; all groups have one size, the largest that is possible."""
    size = math.gcd(*(len(list(run)) for _, run in groupby(names)))
    return list(names[::size])
