"""Score many adapters of one base, and serve them in one batch, one per sequence.

    bank = AdapterBank.open(MODEL, DIR, cache=32)
    with bank.use(["law", "code", None]):            one for each sequence; None: the base alone
        logits = bank.model(input_ids=ids).logits
    bank.generate(ids, adapters=["law", "code", "law"], max_new_tokens=20)

DIR contains named adapters (`adapter_io.export_adapter`), checkpoints or run folders.
Memory holds the base once, the most recently used adapters, and the MoRA matrices of the
current batch. Nothing is merged, and the base is never modified. In fp32 the result of a
sequence is that of its adapter merged alone, up to rounding.

    y_b = W0 x_b + bias + sum over all cycles of b's adapter, merged or not: scale decompress(M compress(x_b))

Sequences whose adapters have the same operator in a cycle, as runs with one seed have,
are computed by one product.
"""

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
from mora_ds.checkpoint.layout import ADAPTER_JSON, adapter_folder
from mora_ds.common.errors import UserError, unknown
from mora_ds.common.tensor_files import compute_dtype
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.load import load_model

Adapters = str | Sequence[str | None]
"""One name for all sequences, or one name (None: the base alone) for each."""

MoRAMatrices = dict[str, dict[OperatorSpec, Tensor]]
"""Layer -> operator -> M of one adapter, summed over the cycles with that operator."""


@dataclass(frozen=True)
class BatchUpdate:
    """The update of one layer by all adapters of a batch with the same operator."""

    spec: OperatorSpec
    tables: IndexTables
    """The operator's tables. This reference keeps them cached."""
    indices: Tensor
    """(n,) indices of the sequences that have an adapter with this operator."""
    mora_matrices: Tensor
    """(n, R, R), the MoRA matrix of each of these sequences."""

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, T, O) plus the update for x (B, T, D)."""
        inputs = x.index_select(0, self.indices)
        update = update_rows(self.spec, self.mora_matrices.to(x.dtype), inputs)
        return y.index_add(0, self.indices, update)


class AdapterBank:
    """A model with a folder of adapters. Create with `open`. Not thread-safe."""

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
        self.mora_matrices_of = lru_cache(maxsize=cache)(self._read)
        """The MoRA matrices of an adapter; the most recently used ones are cached."""
        self._terms: dict[str, list[BatchUpdate]] = {}
        """Layer -> its updates for the current batch."""
        self._batch_size: int | None = None
        """Batch size of the updates; None: one adapter for any batch size."""
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
        """Load the base in evaluation mode and open every adapter. MoRA matrices are
        read on first use.

        `base`: the model folder of all adapters. `cache`: maximum number of adapters in
        memory; None: all. `dtype` "auto": the compute dtype of the adapters' runs if
        they have the same, else float32. Raises `UserError` that names a damaged or
        unsupported adapter: of another base, with another kind of update, or with other
        trained tensors (modules_to_save).
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
        """A context in which every forward of `model` adds to each sequence the update
        of its adapter.

        `adapters`: a name for all sequences, or a name (None: the base alone) for each
        sequence of the batches. Raises `UserError` for an unknown name, and in a
        forward for another batch size.
        """
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        terms = self._terms_of(names)
        terms_before = self._terms
        batch_size_before = self._batch_size
        self._terms = terms
        self._batch_size = None if isinstance(adapters, str) else len(names)
        try:
            yield
        finally:
            self._terms = terms_before
            self._batch_size = batch_size_before

    @torch.no_grad()
    def generate(self, input_ids: Tensor, adapters: Adapters, **settings: Any) -> Any:
        """transformers' `generate` with an adapter for each sequence of `input_ids`
        (B, T).

        Pad sequences of different length on the left and pass `attention_mask` in
        `settings`. Raises `UserError` if the number of adapters is not B, and for
        settings that generate several outputs per sequence.
        """
        if not isinstance(adapters, str) and len(adapters) != len(input_ids):
            raise UserError(
                f"adapters are named for {len(adapters)} sequence(s), but the batch has {len(input_ids)}"
            )
        with self.use(adapters):
            return self.model.generate(input_ids, **settings)

    def _read(self, name: str) -> MoRAMatrices:
        adapter = self.adapters[name]
        layers: MoRAMatrices = {}
        for layer, entry in adapter.file.layers.items():
            current = (entry.operator, adapter.tensors.mora_matrix(layer))
            sums: dict[OperatorSpec, Tensor] = defaultdict(lambda: torch.zeros(()))
            for spec, mora_matrix in [*adapter.ledger.mora_matrices_of(layer), current]:
                operator = operator_of(spec, layer)
                sums[operator] = sums[operator] + mora_matrix
            layers[layer] = {
                operator: mora_matrix.to(self.model.device, self.dtype)
                for operator, mora_matrix in sums.items()
            }
        return layers

    def _terms_of(self, names: Sequence[str | None]) -> dict[str, list[BatchUpdate]]:
        """Layer -> the updates by the adapters of all sequences."""
        chosen: dict[str, MoRAMatrices] = {}
        for name in dict.fromkeys(names):
            if name is not None:
                if name not in self.adapters:
                    raise UserError(unknown("adapter", name, self.adapters))
                chosen[name] = self.mora_matrices_of(name)
        mora_matrices_by_index: dict[tuple[str, OperatorSpec], dict[int, Tensor]]
        mora_matrices_by_index = defaultdict(dict)
        for index, name in enumerate(names):
            for layer, mora_matrices in chosen.get(name or "", {}).items():
                for spec, mora_matrix in mora_matrices.items():
                    mora_matrices_by_index[layer, spec][index] = mora_matrix
        device = self.model.device
        terms: dict[str, list[BatchUpdate]] = defaultdict(list)
        for (layer, spec), by_index in mora_matrices_by_index.items():
            indices = torch.tensor(list(by_index), device=device)
            stack = torch.stack(list(by_index.values()))
            terms[layer].append(
                BatchUpdate(spec, tables_of(spec, device), indices, stack)
            )
        return terms

    def _add_terms(
        self, layer: str, module: nn.Module, inputs: tuple[Tensor], y: Tensor
    ) -> Tensor:
        """Forward hook of a linear layer."""
        (x,) = inputs
        if layer not in self._terms:
            return y
        if self._batch_size is not None and (x.dim() < 3 or len(x) != self._batch_size):
            raise UserError(
                f"adapters are named for {self._batch_size} sequence(s), but the input of {layer} is {tuple(x.shape)}; "
                "for a layer whose input is not a batch of full sequences, use one adapter for all sequences"
            )
        count = self._batch_size or 1
        x = x.reshape(count, -1, x.shape[-1])
        result = y.reshape(count, -1, y.shape[-1])
        for term in self._terms[layer]:
            result = term.add(result, x)
        return result.view(y.shape)


def find_adapters(folder: Path) -> dict[str, Path]:
    """Name -> folder with adapter.json, sorted. Raises `UserError` if there is none."""
    if not folder.is_dir():
        raise UserError(f"DIR: no such folder: {folder}")
    adapters = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # not completely written yet
            continue
        checkpoint = adapter_folder(path)
        if checkpoint is not None:
            adapters[path.name] = checkpoint
    if not adapters:
        raise UserError(f"DIR: no folder in {folder} has an adapter ({ADAPTER_JSON})")
    return adapters


def _open(name: str, folder: Path, base: BaseCheckpoint) -> Adapter:
    """Open an adapter and verify its files. Raises `UserError` unless it is of this base
    and has only one MoRA matrix per layer."""
    try:
        adapter = Adapter.open(folder)
        adapter.reference.require_base(base, folder, "MODEL")
        for layer, entry in adapter.file.layers.items():
            operator_of(entry.operator, layer)
        unsupported = {
            "MoRA matrices of domains": adapter.file.domains is not None,
            "other trained tensors than MoRA matrices": bool(adapter.file.trainables),
            "changes of the base's config": bool(adapter.reference.config_changes),
        }
        for what, holds in unsupported.items():
            if holds:
                raise UserError(
                    f"it has {what}: evaluate it alone, with mora-ds evaluate"
                )
    except UserError as error:
        raise UserError(f"adapter {name!r} cannot be used: {error}") from error
    return adapter
