"""Exact arithmetic of updates: the weighted sum of adapters of one base is an adapter of that base.

    W = W0 + sum_i w_i delta_i             delta(M) is linear in M: sum_i w_i delta(M_i) = delta(sum_i w_i M_i)

    sources, weights -> terms              a term has the operators of one cycle of one seed; equal ones become one term
             MoRA matrices of a term       summed in fp64, rounded to fp32 once
             other trained tensors         W0 + sum_i w_i (T_i - W0), the same
    -> output/       ledger/ (a cycle for every term but one), adapter.safetensors: the last source's live term

So a mean over the checkpoints of a run is no larger than one of them. LoRA's product is not linear in its factors:
each source is a term of its own there, whose factor B is multiplied. One tensor is in memory at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from mora_ds.adapters.low_rank_embeddings import is_low_rank, sum_of_products
from mora_ds.adapters.new_embeddings import is_new_rows, stands_for
from mora_ds.checkpoint.adapter_files import Adapter, AdapterFile
from mora_ds.checkpoint.layout import (
    ADAPTER_JSON,
    ADAPTER_TENSORS,
    LEDGER_FOLDER,
    adapter_folder,
    complete_checkpoints,
    find_adapter,
    is_step_name,
    step_of,
)
from mora_ds.common.errors import Bounds, RunError, UserError, whole_number
from mora_ds.common.files import (
    as_path,
    atomic_folder,
    atomic_path,
    require_new,
    write_json_atomic,
)
from mora_ds.common.tensor_files import SafetensorsWriter
from mora_ds.deploy.adapter_io import complete
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import LayerEntry, Ledger

COMBINED = "combined_from"
"""The fact of adapter.json that lists the sources with their weights."""


@dataclass(frozen=True)
class Mix:
    """What to make of the update of a run before it is used. The default leaves it as it is."""

    delta_scale: float = 1.0
    """Multiplies the update: 0 is the base, 1 the trained model, values between them lie between the two."""
    average_last: int = 1
    """Checkpoints whose mean is taken, up to and including the named one."""

    @property
    def is_plain(self) -> bool:
        return self.delta_scale == 1 and self.average_last == 1

    @property
    def scale(self) -> str:
        """`delta_scale` with all its digits: 1, 0.5, 0.12345671."""
        return repr(self.delta_scale).removesuffix(".0")

    def __str__(self) -> str:
        mean = f", mean of the last {self.average_last} checkpoints" if self.average_last > 1 else ""
        return f"update x {self.scale}{mean}"

    def check(self) -> None:
        """Raises `UserError` naming the field whose value is impossible."""
        whole_number(self.average_last, 1, "`average_last`")
        if not Bounds().allow(self.delta_scale):
            raise UserError(f"`delta_scale` must be a finite number, got {self.delta_scale!r}")

    def sources(self, path: Path) -> list[tuple[Path, Fraction]]:
        """The adapters to be summed, oldest first, with their weights, all alike. `path`: as `find_adapter` takes it.
        Raises `UserError` where a run has too few checkpoints."""
        newest = find_adapter(path)
        folders = [newest]
        if self.average_last > 1:
            if not is_step_name(newest.name):
                raise UserError(f"`average_last`: {path} is no checkpoint of a run: it has no earlier ones beside it")
            known = complete_checkpoints(newest.parent)
            folders = [folder for folder in known if step_of(folder) <= step_of(newest)][-self.average_last :]
            if len(folders) < self.average_last:
                raise UserError(
                    f"`average_last` {self.average_last}: {newest.parent} has {len(folders)} checkpoint(s) up to"
                    f" {newest.name}; --save_steps and --save_total_limit say how many a run keeps"
                )
        return [(folder, Fraction(self.delta_scale) / len(folders)) for folder in folders]


@contextmanager
def mixed(path: Path, mix: Mix, base_folder: Path | None = None) -> Iterator[Path]:
    """The adapter that `mix` makes of the one at `path`: in a temporary folder, or `path` itself where it changes
    nothing. Raises `UserError` as `combine_adapters` and `Mix` do."""
    mix.check()
    if mix.is_plain:
        yield path
        return
    if adapter_folder(path) is None:
        raise UserError(f"`delta_scale` and `average_last` belong to a checkpoint or an adapter, which {path} is not")
    with tempfile.TemporaryDirectory(prefix="mora_ds-") as folder:
        output = Path(folder) / "adapter"
        sources, weights = zip(*mix.sources(path), strict=True)
        combine_adapters(sources, weights, output, base_folder)
        yield output


def combine_adapters(
    sources: Sequence[Path | str],
    weights: Sequence[float | Fraction],
    output: Path | str,
    base_folder: Path | str | None = None,
) -> list[str]:
    """Writes the adapter whose update is the sum of those of `sources`, each times its weight, to a new folder.

    `sources`: checkpoints, runs (their latest one) or exported adapters, all of one base and the same layers; ranks,
    operators and seeds may differ. `weights`: any finite numbers. `base_folder`: the base, if it was moved; read only
    where embeddings, norms or a head were trained and the weights do not sum to 1, and with --train_embedding_rank.
    Returns lines to print. Raises `UserError` naming what does not fit, `RunError` for damaged sources, values that are
    not finite and a full disk.
    """
    output = as_path(output, "combine_adapters: `output`")
    if isinstance(sources, (str, Path)) or not isinstance(sources, Sequence):
        raise UserError(f"combine_adapters: `sources` must be paths in a list, got {sources!r}")
    if not isinstance(weights, Sequence) or not all(isinstance(weight, (int, float, Fraction)) for weight in weights):
        raise UserError(f"combine_adapters: `weights` must be numbers in a list, got {weights!r}")
    if len(weights) != len(sources) or not sources:
        raise UserError(f"`weights`: {len(weights)} for {len(sources)} adapter(s); give one for each")
    if odd := [str(weight) for weight in weights if not math.isfinite(weight)]:
        raise UserError(f"`weights` must be finite, got {odd[0]}")
    require_new(output)
    opened = [
        _Source.of(as_path(path, "combine_adapters: one of `sources`"), Fraction(weight))
        for path, weight in zip(sources, weights, strict=True)
    ]
    last = opened[-1]
    for source in opened[:-1]:
        _check_pair(source, last)
    terms = _terms(opened)
    trained = _Trained(opened, None if base_folder is None else as_path(base_folder, "combine_adapters: `base_folder`"))
    facts = [
        {"adapter": str(source.folder), "step": source.file.step, "weight": float(source.weight)} for source in opened
    ]
    rank = sum(source.file.config.embedding_rank for source in opened)  # products of low rank lie side by side
    config = replace(last.file.config, embedding_rank=rank)
    adapter = replace(last.file, cycle=len(terms) - 1, config=config, facts={**last.file.facts, COMBINED: facts})
    with atomic_folder(output.absolute()) as folder:
        ledger = Ledger.create(folder / LEDGER_FOLDER, last.reference.fingerprint)
        for term in terms[:-1]:
            ledger.append(term.step, term.layers, ((module, term.value(module)) for module in term.layers))
        _write_tensors(folder / ADAPTER_TENSORS, adapter, terms[-1], opened, trained)
        write_json_atomic(folder / ADAPTER_JSON, adapter.to_dict())
        reference = last.reference.absolute(last.folder)
        if base_folder is not None:
            reference = replace(reference, folder=str(Path(base_folder).resolve()))
        complete(folder, last.folder, reference)
    formula = ", ".join(f"{float(source.weight):g} x {source.folder}" for source in opened)
    return [f"wrote {output}: {formula}", f"{len(terms)} term(s) in {len(adapter.layers)} layers; {len(terms) - 1} of"
            " them in its ledger"]  # fmt: skip


@dataclass(frozen=True)
class _Source(Adapter):
    """One of the adapters that are summed."""

    weight: Fraction

    @classmethod
    def of(cls, path: Path, weight: Fraction) -> _Source:
        adapter = Adapter.open(find_adapter(path), damaged=RunError, adapter_only=True)
        return cls(**vars(adapter), weight=weight)


def _check_pair(source: _Source, last: _Source) -> None:
    """Raises `UserError` unless two updates can be summed."""
    pair = f"{source.folder} and {last.folder}"
    if source.reference.fingerprint != last.reference.fingerprint:
        raise UserError(f"{pair} have different bases: only updates of the same weights can be summed")
    if source.reference.config_changes != last.reference.config_changes:
        raise UserError(f"{pair} have bases with different rotary embeddings (--rope_scaling)")
    if different := sorted(set(source.file.layers) ^ set(last.file.layers)):
        raise UserError(f"{pair} adapt different layers (`target_modules`), e.g. {different[0]}")
    if different := sorted(set(source.file.trainables) ^ set(last.file.trainables)):
        raise UserError(f"{pair} train different tensors beside their matrices, e.g. {different[0]}")
    if source.file.domains != last.file.domains:
        raise UserError(f"{pair} have different domains, or other operators for them")


# -- terms -------------------------------------------------------------------------------------------------------------


_Cycle = tuple[str, int, dict[str, LayerEntry], Callable[[str], Tensor]]
"""A name for its content, its step, its layers, and the value of each of them."""


@dataclass
class _Term:
    """Values of all layers with the same operators, and what each counts."""

    step: int
    layers: dict[str, LayerEntry]
    contents: dict[str, tuple[Fraction, Callable[[str], Tensor]]] = field(default_factory=dict)
    """A name for the content, such as its hash -> its weight, and the value of a module. The same content in several
    sources, such as a merged cycle in the checkpoints after it, is there once, and its weights are summed exactly."""

    @property
    def is_linear(self) -> bool:
        return all(entry.operator.is_linear for entry in self.layers.values())

    def takes(self, content: str, layers: dict[str, LayerEntry]) -> bool:
        return layers == self.layers and (self.is_linear or content in self.contents)

    def add(self, content: str, weight: Fraction, value: Callable[[str], Tensor]) -> None:
        known = self.contents.get(content, (Fraction(0), value))[0]
        self.contents[content] = known + weight, value

    def value(self, module: str) -> Tensor:
        """The layer's MoRA matrix or LoRA factors in fp32. Raises `RunError` where they are not finite."""
        scaled = self.layers[module].operator.scaled
        values = (scaled(value(module).double(), float(weight)) for weight, value in self.contents.values())
        return _rounded_sum(values, module)


def _terms(sources: Sequence[_Source]) -> list[_Term]:
    """The live term of the last source comes last."""
    terms: list[_Term] = []
    for number, source in enumerate(sources):
        ledger = source.ledger
        cycles: list[_Cycle] = [
            (record.sha256, record.step, ledger.layers(record.cycle), partial(ledger.square, record.cycle))
            for record in ledger.records
        ]
        live = (f"live {number}", source.file.step, source.file.layers, source.tensors.square)
        for content, step, layers, value in [*cycles, live]:
            matching = [term for term in terms if term.takes(content, layers)]
            term = matching[0] if matching else _Term(step, layers)
            if not matching:
                terms.append(term)
            term.step = max(term.step, step)
            term.add(content, source.weight, value)
    terms.remove(term)
    return [*terms, term]


def _rounded_sum(summands: Iterable[Tensor], name: str) -> Tensor:
    """The sum of fp64 tensors, rounded to fp32 once. Raises `RunError` where it is not finite."""
    total = reduce(torch.add, summands).float()
    if not torch.isfinite(total).all():
        raise RunError(f"the sum of {name} is not finite: a source holds no numbers there, or a weight is too large")
    return total


# -- other tensors -----------------------------------------------------------------------------------------------------


class _Trained:
    """Sums of the tensors that were trained beside the matrices: embeddings, norms, heads."""

    def __init__(self, sources: Sequence[_Source], base_folder: Path | None) -> None:
        self._sources = sources
        self._base_folder = base_folder
        self._of_base = 1 - sum((source.weight for source in sources), Fraction(0))
        self._base: BaseCheckpoint | None = None
        names = sources[-1].file.trainables
        if (names and self._of_base) or any(map(is_low_rank, names)):
            self._base = sources[-1].reference.open_base(
                sources[-1].folder,
                base_folder,
                flag="`base_folder`",
            )

    def value(self, name: str) -> Tensor:
        """base + sum_i w_i (T_i - base), as sum_i w_i T_i + (1 - sum_i w_i) base; products of low rank side by side."""
        weighted_tensors = [(source.weight, source.tensors.trained(name)) for source in self._sources]
        if is_low_rank(name):
            base, key = self._original(name)
            products = ((low_rank, float(weight)) for weight, low_rank in weighted_tensors)
            return _rounded_sum([sum_of_products(products, base.shape_dtype(key)[0][0])], name)
        if self._of_base:
            base, key = self._original(name)
            original = base.read(key)
            if is_new_rows(name):
                original = original[len(original) - len(weighted_tensors[0][1]) :]
            weighted_tensors.append((self._of_base, original))
        return _rounded_sum((tensor.double() * float(weight) for weight, tensor in weighted_tensors), name)

    def _original(self, name: str) -> tuple[BaseCheckpoint, str]:
        """The base, and the key of what a trained tensor stands for. Raises `UserError` where the base has none."""
        assert self._base is not None
        last = self._sources[-1]
        return self._base, last.original_key(self._base, stands_for(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of `value`."""
        shapes = [source.tensors.trained_shape(name) for source in self._sources]
        return (shapes[-1][0], sum(rank for _, rank in shapes)) if is_low_rank(name) else shapes[-1]


def _write_tensors(
    path: Path,
    adapter: AdapterFile,
    live: _Term,
    sources: Sequence[_Source],
    trained: _Trained,
) -> None:
    shapes = {**adapter.expected(), **{name: trained.shape(name) for name in adapter.trainables}}
    layout = {name: (shape, torch.float32) for name, shape in shapes.items()}
    with atomic_path(path) as beside, SafetensorsWriter(beside, layout, {"step": str(adapter.step)}) as writer:
        for module, entry in adapter.layers.items():
            writer.write(entry.square, live.value(module))
            if adapter.domains is not None:
                name = adapter.domains.tensor(module)
                stacks = (source.tensors.trained(name).double() * float(source.weight) for source in sources)
                writer.write(name, _rounded_sum(stacks, name))
        for name in adapter.trainables:
            writer.write(name, trained.value(name))
