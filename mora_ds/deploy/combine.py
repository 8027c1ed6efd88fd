"""The weighted sum of adapters of one base, which is an adapter of that base, exactly.

    W = W0 + sum_i w_i delta_i             delta(M) is linear in M: sum_i w_i delta(M_i) = delta(sum_i w_i M_i)

    sources, weights -> cycles             a cycle has the operators of one seed; equal ones become one cycle
             MoRA matrices of a cycle      summed in fp64, rounded to fp32 once
             other trained tensors         W0 + sum_i w_i (T_i - W0), the same
    -> output/       ledger/ (every cycle but one), adapter.safetensors: the last source's current cycle

So a sum over checkpoints of a run is no larger than one of them. LoRA's product is not
linear in its factors: each cycle of each source stays a cycle of its own there, whose
factor B is multiplied. One tensor is in memory at a time.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from mora_ds.adapters.low_rank_embeddings import is_low_rank, sum_of_products
from mora_ds.adapters.new_embeddings import is_new_rows, stands_for
from mora_ds.adapters.ops.spec import additive
from mora_ds.adapters.registry import Capability, require
from mora_ds.checkpoint.adapter_files import Adapter
from mora_ds.checkpoint.layout import (
    ADAPTER_JSON,
    ADAPTER_TENSORS,
    LEDGER_FOLDER,
    adapter_folder,
    find_adapter,
)
from mora_ds.common.errors import Bounds, RunError, UserError
from mora_ds.common.fetched import with_urls
from mora_ds.common.files import (
    as_path,
    atomic_folder,
    atomic_path,
    require_new,
    require_outside,
    write_json_atomic,
)
from mora_ds.common.tensor_files import SafetensorsWriter, Shape
from mora_ds.deploy.adapter_io import complete
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import Layers, Ledger

COMBINED = "combined_from"
"""The fact of adapter.json that lists the sources with their weights."""


@contextmanager
def scaled(
    path: Path, delta_scale: float, base_folder: Path | None = None
) -> Iterator[Path]:
    """The adapter at `path` with its update times `delta_scale` (0: the base, 1: the
    trained model), in a temporary folder; `path` itself for 1. Raises `UserError` as
    `combine_adapters` does, and for a model that is no adapter."""
    if not Bounds().allow(delta_scale):
        raise UserError(f"`delta_scale` must be a finite number, got {delta_scale!r}")
    if delta_scale == 1:
        yield path
        return
    if adapter_folder(path) is None:
        raise UserError(
            f"`delta_scale` belongs to a checkpoint or an adapter, which {path} is not"
        )
    with tempfile.TemporaryDirectory(prefix="mora_ds-") as scratch:
        output = Path(scratch) / "adapter"
        combine_adapters([path], [delta_scale], output, base_folder)
        yield output


def combine_adapters(
    sources: Sequence[Path | str],
    weights: Sequence[float],
    output: Path | str,
    base_folder: Path | str | None = None,
) -> list[str]:
    """Write the adapter whose update is the sum of those of `sources`, each times its
    weight, to a new folder.

    `sources`: checkpoints, runs (their latest one) or exported adapters, all of one
    base and the same layers; ranks, operators and seeds may differ. `weights`: any
    finite numbers. `base_folder`: the base, if it was moved; read only where
    embeddings, norms or a head were trained. Returns lines to print. Raises `UserError`
    naming what does not fit or is damaged, `RunError` for values that are not finite
    and a full disk.
    """
    output = as_path(output, "combine_adapters: `output`")
    if len(weights) != len(sources) or not sources:
        raise UserError(
            f"`weights`: {len(weights)} for {len(sources)} adapter(s); give one for each"
        )
    if odd := [weight for weight in weights if not Bounds().allow(weight)]:
        raise UserError(f"`weights` must be finite numbers, got {odd[0]!r}")
    require_new(output)
    paths = [as_path(path, "combine_adapters: one of `sources`") for path in sources]
    adapters = [Adapter.open(find_adapter(path)) for path in paths]
    last = adapters[-1]
    for adapter in adapters:
        require_outside(output, adapter.folder)
        require(adapter.file.config.adapter, Capability.SUM, str(adapter.folder))
    for adapter in adapters[:-1]:
        _check_pair(adapter, last)
    reference = last.reference.absolute(last.folder)
    if base_folder is not None:
        reference = replace(reference, folder=with_urls(Path(base_folder).resolve()))
    base = None
    if last.file.trainables:
        base = reference.open_base(last.folder, flag="`base_folder`")
    trained = _Trained(adapters, weights, base)
    *merged, live = _cycles(adapters, weights)
    facts = []
    summands = []
    for adapter, weight in zip(adapters, weights, strict=True):
        name = str(adapter.folder)
        facts.append({"adapter": name, "step": adapter.file.step, "weight": weight})
        summands.append(f"{weight:g} x {name}")
    # Products of low rank lie side by side.
    rank = sum(adapter.file.config.embedding_rank for adapter in adapters)
    combined = replace(
        last.file,
        cycle=len(merged),
        config=replace(last.file.config, embedding_rank=rank),
        facts={**last.file.facts, COMBINED: facts},
    )
    shapes = combined.expected()
    for name in combined.trainables:
        shapes[name] = trained.shape(name)
    layout = {name: (shape, torch.float32) for name, shape in shapes.items()}
    with atomic_folder(output.absolute()) as folder:
        ledger = Ledger.create(folder / LEDGER_FOLDER, reference.fingerprint)
        for cycle in merged:
            adapter_weights = (
                (module, cycle.adapter_weight(module)) for module in cycle.layers
            )
            ledger.append(cycle.step, cycle.layers, adapter_weights)
        with (
            atomic_path(folder / ADAPTER_TENSORS) as partial_file,
            SafetensorsWriter(
                partial_file, layout, {"step": str(combined.step)}
            ) as writer,
        ):
            for module, entry in combined.layers.items():
                writer.write(entry.mora_matrix, live.adapter_weight(module))
                if combined.domains is not None:
                    name = combined.domains.tensor(module)
                    writer.write(name, _rounded_sum(trained.weighted(name), name))
            for name in combined.trainables:
                writer.write(name, trained.tensor(name))
        write_json_atomic(folder / ADAPTER_JSON, combined.to_dict())
        complete(folder, last.folder, reference)
    return [
        f"wrote {output}: {', '.join(summands)}",
        f"{len(merged) + 1} cycle(s), {len(merged)} of them in its ledger",
    ]


def _check_pair(adapter: Adapter, last: Adapter) -> None:
    """Raise `UserError` unless two updates can be summed."""
    pair = f"{adapter.folder} and {last.folder}"
    if adapter.reference.fingerprint != last.reference.fingerprint:
        raise UserError(
            f"{pair} have different bases: only updates of the same weights can be summed"
        )
    if adapter.reference.config_changes != last.reference.config_changes:
        raise UserError(
            f"{pair} have bases with different rotary embeddings (--rope_scaling)"
        )
    if different := sorted(set(adapter.file.layers) ^ set(last.file.layers)):
        raise UserError(
            f"{pair} adapt different layers (`target_modules`), e.g. {different[0]}"
        )
    if different := sorted(set(adapter.file.trainables) ^ set(last.file.trainables)):
        raise UserError(
            f"{pair} train different tensors, apart from their matrices, e.g. {different[0]}"
        )
    if adapter.file.domains != last.file.domains:
        raise UserError(f"{pair} have different domains, or other operators for them")


@dataclass(eq=False)
class _Cycle:
    """The adapter weights of a cycle, of several adapters where they can be summed."""

    step: int
    layers: Layers
    sources: list[tuple[float, Callable[[str], Tensor]]]
    """Each adapter's factor, and its adapter weight of a module."""

    @property
    def is_summable(self) -> bool:
        """Whether adapter weights of the same operators are summed elementwise."""
        operators = [additive(entry.operator) for entry in self.layers.values()]
        return all(operator.of_sum(2) == operator for operator in operators)

    def adapter_weight(self, module: str) -> Tensor:
        """The sum in fp32. Raises `RunError` where it is not finite."""
        times = additive(self.layers[module].operator).scaled
        summands = (
            times(read(module).double(), factor) for factor, read in self.sources
        )
        return _rounded_sum(summands, module)


def _cycles(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[_Cycle]:
    """The current cycle of the last adapter comes last."""
    distinct: list[_Cycle] = []
    for adapter, weight in zip(adapters, weights, strict=True):
        ledger = adapter.ledger
        cycles = []
        for record in ledger.records:
            mora_matrix = partial(ledger.mora_matrix, record.cycle)
            layers = ledger.layers(record.cycle)
            cycles.append(_Cycle(record.step, layers, [(weight, mora_matrix)]))
        live = adapter.tensors.mora_matrix
        cycles.append(_Cycle(adapter.file.step, adapter.file.layers, [(weight, live)]))
        for cycle in cycles:
            equal = [known for known in distinct if known.layers == cycle.layers]
            if equal and cycle.is_summable:
                last = equal[0]
                last.sources += cycle.sources
                last.step = max(last.step, cycle.step)
            else:
                last = cycle
                distinct.append(last)
    distinct.remove(last)
    return [*distinct, last]


def _rounded_sum(summands: Iterable[Tensor], name: str) -> Tensor:
    """The sum of fp64 tensors, rounded to fp32 once. Raises `RunError` unless it is
    finite."""
    total = reduce(torch.add, summands).float()
    if not torch.isfinite(total).all():
        raise RunError(
            f"the sum of {name} is not finite: a source holds no numbers there, or a weight is too large"
        )
    return total


@dataclass(frozen=True)
class _Trained:
    """Sums of what was trained besides the matrices: embeddings, norms, heads."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    base: BaseCheckpoint | None
    """None where there are no such tensors."""

    def weighted(self, name: str) -> list[Tensor]:
        """Each adapter's tensor times its weight, in fp64."""
        pairs = zip(self.adapters, self.weights, strict=True)
        return [
            adapter.tensors.trained(name).double() * weight for adapter, weight in pairs
        ]

    def tensor(self, name: str) -> Tensor:
        """base + sum_i w_i (T_i - base), as sum_i w_i T_i + (1 - sum_i w_i) base;
        products of low rank side by side."""
        assert self.base is not None
        key = self.adapters[-1].original_key(self.base, stands_for(name))
        if is_low_rank(name):
            tensors = [adapter.tensors.trained(name) for adapter in self.adapters]
            tokens = self.base.shape_dtype(key)[0][0]
            pairs = zip(tensors, self.weights, strict=True)
            return _rounded_sum([sum_of_products(pairs, tokens)], name)
        original = self.base.read(key)
        if is_new_rows(name):
            original = original[len(original) - self.shape(name)[0] :]
        if tuple(original.shape) != tuple(self.shape(name)):
            raise UserError(
                f"{self.base.folder}: {key} has the shape {tuple(original.shape)}, and {name} of the adapters "
                f"{tuple(self.shape(name))}: their base.json or files are damaged"
            )
        of_base = 1 - math.fsum(self.weights)
        return _rounded_sum([*self.weighted(name), original.double() * of_base], name)

    def shape(self, name: str) -> Shape:
        """Of `tensor`."""
        shapes = [adapter.tensors.trained_shape(name) for adapter in self.adapters]
        if is_low_rank(name):
            return shapes[-1][0], sum(rank for _, rank in shapes)
        return shapes[-1]
