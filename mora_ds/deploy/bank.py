"""Hundreds of adapters over one base in one process, chosen row by row of a batch.

    bank = AdapterBank.open(base, folder, cache_adapters=32)
    with bank.use(["law", "code", None]):            a row each; None: the base alone
        logits = bank.model(input_ids=ids).logits
    bank.generate(ids, adapters=["law", "code", "law"], max_new_tokens=20)

In memory are the base once, the adapters used last within the bound that is set, and the squares of the batch in
progress. Squares stay squares (see `bank_layer`): nothing is merged, and the base is never written to. In fp32 a row's
result is that of its adapter merged alone, to rounding. A merged model in bf16 has its weights rounded after the merge,
and a run's live one with --base_bits 8 as well; a bank rounds none of that.
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
from transformers import AutoModelForCausalLM

from mora_ds.adapters.layer import is_linear, linear_shape
from mora_ds.checkpoint.adapter_files import AdapterFile
from mora_ds.deploy.bank_files import (
    BankLayer,
    NotOfThisBank,
    Resident,
    agree,
    find_adapters,
    read_headers,
    read_resident,
)
from mora_ds.deploy.bank_layer import BankLinear, Rows, stack_terms
from mora_ds.errors import UserError, nearest
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.tensor_files import compute_dtype

Adapters = str | Sequence[str | None]
"""One name for all rows, or one (None: the base alone) for each."""


class ResidentCache:
    """The adapters used last, at most so many of them or so many bytes; None: no bound."""

    def __init__(self, read: Callable[[str], Resident], adapters: int | None, nbytes: int | None) -> None:
        for value, flag in ((adapters, "cache_adapters"), (nbytes, "cache_bytes")):
            if value is not None and value < 1:
                raise UserError(f"{flag} must be at least 1, got {value}")
        self._read, self._most, self._most_bytes = read, adapters, nbytes
        self._held: OrderedDict[str, Resident] = OrderedDict()
        self.reads = 0
        """How often an adapter was read from disk."""

    def get(self, name: str) -> Resident:
        """One that is larger than the bound is read, but not kept."""
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        found = self._read(name)
        self.reads += 1
        if self._most_bytes is not None and found.nbytes > self._most_bytes:
            return found
        self._held[name] = found
        while self._too_much():
            self._held.popitem(last=False)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The one used last at the end."""
        return tuple(self._held)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._held.values())

    def _too_much(self) -> bool:
        return (self._most is not None and len(self._held) > self._most) or (
            self._most_bytes is not None and self.nbytes > self._most_bytes
        )


class AdapterBank:
    """A model with a folder of adapters. Make one with `AdapterBank.open`; one thread at a time may use it."""

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
        """Name -> what is wrong, of adapters that could not even be opened; others are looked at when they are used."""
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
        """Loads the base, in evaluation mode, and the headers of every adapter; their squares when they are used.

        `base`: the model folder that all were trained on. `folder`: see `bank_files`. `cache_adapters`, `cache_bytes`:
        what may stay in memory of adapters that are not in use. `dtype` "auto": what the adapters' runs computed in
        where they agree, else float32. Raises `UserError` naming the adapter that does not belong: of another base,
        another operator or size than the others, with other trained tensors beside its squares, or with a name that is
        there twice.
        """
        opened = BaseCheckpoint.open(base, "MODEL")
        paths = find_adapters(Path(folder))
        adapters, damaged = _headers(paths, opened.fingerprint())
        forms: dict[str, BankLayer] = {}
        for name, adapter in adapters.items():
            agree(name, adapter.layers, forms)
        chosen = _common_dtype(adapters) if dtype == "auto" else compute_dtype(dtype)
        model = _load_base(opened.folder, chosen, attn_implementation, trust_remote_code)

        def read(name: str) -> Resident:
            return read_resident(name, paths[name], opened.fingerprint(), forms, chosen, device)

        cache = ResidentCache(read, cache_adapters, cache_bytes)
        layers = _replace_layers(model, forms)
        return cls(model.to(device), opened.folder, paths, layers, forms, damaged, cache)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, sorted."""
        return tuple(self.folders)

    @contextmanager
    def use(self, adapters: Adapters) -> Iterator[None]:
        """Within the block every forward of `model` adds to each row the update of its adapter.

        `adapters`: a name for all rows, or a name (None: none) for each row of the batches to come. Raises `UserError`
        for an unknown name or a damaged adapter, and where a batch has other rows.
        """
        with self._using(adapters, expands=False):
            yield

    @torch.no_grad()
    def generate(self, input_ids: Tensor, adapters: Adapters, **settings: Any) -> Any:
        """transformers' `generate` with an adapter for each row of `input_ids` (rows, tokens), left-padded where they
        differ in length, with `attention_mask` among the settings. Beams and `num_return_sequences` keep the adapter of
        the row that they are of. Returns what `generate` does."""
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
            self._rows, kept = before
            for name, layer in self._layers.items():
                layer.terms = kept[name]

    @torch.no_grad()
    def _terms_of(self, rows: Rows, groups: Sequence[str | None]) -> dict[str, Any]:
        different = list(dict.fromkeys(name for name in groups if name is not None))
        self.check_names(different)
        of = [-1 if name is None else different.index(name) for name in groups]
        held = self.cache.names
        residents = {name: self.cache.get(name) for name in sorted(different, key=lambda name: name not in held)}
        own = [residents[name] for name in different]
        return {
            name: stack_terms(known.form, rows, [each.of(name, known.form.r_hat) for each in own], of)
            for name, known in self._forms.items()
        }

    def check_names(self, names: Sequence[str]) -> None:
        """Raises `UserError` for one that the bank does not have."""
        for name in names:
            if name not in self.folders:
                raise UserError(f"the bank has no adapter {name!r}.{nearest(name, self.names)}")

    def _see_batch(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rows is None:
            return
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        for each in given:
            if isinstance(each, Tensor):
                self._rows.come(each.shape[0], each.shape[1])
                return


def _headers(paths: Mapping[str, Path], fingerprint: str) -> tuple[dict[str, AdapterFile], dict[str, str]]:
    """Of all adapters, and what is wrong with those that are damaged."""
    adapters, damaged = {}, {}
    for name, path in paths.items():
        try:
            adapters[name] = read_headers(name, path, fingerprint)
        except NotOfThisBank:
            raise
        except UserError as error:
            damaged[name] = str(error)
    if not adapters:
        raise UserError(f"--bank: every adapter is damaged, e.g. {damaged[min(damaged)]}")
    return adapters, damaged


def _common_dtype(adapters: Mapping[str, AdapterFile]) -> torch.dtype:
    names = {adapter.dtype for adapter in adapters.values()}
    return compute_dtype(names.pop()) if len(names) == 1 else torch.float32


def _load_base(folder: Path, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool) -> Any:
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"MODEL: {folder} cannot be loaded as a causal language model: {error}") from error
    return model.requires_grad_(False).eval()


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
    """One name for each group of neighbouring rows; all groups are of one size, the largest that is possible."""
    size = math.gcd(*(len(list(run)) for _, run in groupby(names)))
    return list(names[::size])
