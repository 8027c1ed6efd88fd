"""ReMoRA merges: every layer's MoRA matrix M goes into the base and into the merge
ledger, and a fresh one starts.

At a gradient-accumulation boundary, on all ranks, layer by layer in the same order:

    M in fp32 from the master partitions        the only collective: r_hat^2 * 4 bytes a layer
    merged weight = cast(original + all recorded deltas + delta(M)), in place; with --base_bits 8, quantize of that sum;
                  of an adapter whose update is no delta its `merged_weight`, of the original and cycle by cycle;
                  with --base_bits 4, quantize of the original, and M stays in the layer of every process;
                  where the processes of a node share the base, each forms a part of the layers (`rebuild_weights`)
                  the fp32 sum is kept on disk, so that the next merge reads no earlier cycle (`sums`)
    M of every layer into the ledger            one writer a folder (see `Ledger`)
    M, its master weights and its moments to zero; the next cycle's grouping (LoRA: a fresh A)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mora_ds.adapters.config import AdapterConfig
from mora_ds.adapters.inject import frozen_buffers, mora_layers, set_cycle
from mora_ds.adapters.layer import AdaptedLinear, MergeNorms
from mora_ds.adapters.ops.spec import Update
from mora_ds.common.errors import RunError
from mora_ds.common.files import JsonObject
from mora_ds.common.tensor_files import Tensors, tensor_nbytes
from mora_ds.engine import zero
from mora_ds.engine.layer_prefetcher import prefetcher_of
from mora_ds.engine.node_base import NodeBase, node_base_of
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import LayerEntry, Layers, Ledger
from mora_ds.remora.sums import SUMS_FOLDER, MergedSums
from mora_ds.runtime.ranks import Ranks

LOSS_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
    torch.int8: 3e-2,
}
"""How far a merge may move the reference loss, relative to it: what rounding the weights
to that dtype can explain. In 8 bits a number is off by at most 1/254 of its row's
largest, in bf16 by at most 1/256 of itself."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Norms are Frobenius norms over all merged layers."""

    cycle: int
    step: int
    layers: int
    mora_matrix_norm: float
    """Norm of the MoRA matrices."""
    delta_norm: float
    """Norm of the deltas of the matrices."""
    weight_norm: float
    """Norm of the weights before the merge, earlier merges included."""
    rounding_loss: float
    """Fraction of the deltas that is lost to rounding (0 in fp32; the ledger loses
    nothing). Above 1 where deltas are smaller than what rounding changes, as they may be
    in 8 bits."""
    loss_before: float | None = None
    loss_after: float | None = None
    """Loss on the reference batch before and after the merge, if there is one."""

    def row(self) -> JsonObject:
        """All fields but the step, for metrics.jsonl."""
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __str__(self) -> str:
        reference_loss = ""
        if self.loss_before is not None and self.loss_after is not None:
            reference_loss = (
                f", reference loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
            )
        return (
            f"merged cycle {self.cycle} at step {self.step}: {self.layers} layers, |M| {self.mora_matrix_norm:.4g}, "
            f"delta/weight {self.delta_norm / self.weight_norm:.2g}, "
            f"lost to rounding {self.rounding_loss:.1%}{reference_loss}"
        )


def layer_entries(model: nn.Module) -> Layers:
    """Module name -> what the ledger records of the layer in its present cycle."""
    return {
        name: LayerEntry(name, layer.transposed, layer.spec)
        for name, layer in mora_layers(model).items()
    }


class ReMoRA:
    """Merges of one engine, and its base rebuilt at a resume.

    The merged weights are always those of `base` plus all deltas in `ledger`, summed
    in fp32 and rounded once. `keys` maps a layer's weight name to its key in `base`.
    Rank 0 writes the ledger, which all ranks see.
    """

    def __init__(
        self,
        engine: zero.Engine,
        config: AdapterConfig,
        ledger: Ledger,
        base: BaseCheckpoint,
        keys: dict[str, str],
    ) -> None:
        self.engine = engine
        self.config = config
        self.ledger = ledger
        self.base = base
        self.keys = keys
        size = sum(
            tensor_nbytes(layer.shape, torch.float32)
            for layer in mora_layers(engine.module).values()
            if not layer.is_packed
        )
        self.sums = MergedSums(ledger.folder / SUMS_FOLDER, size)

    @property
    def cycle(self) -> int:
        """Number of merges so far, which is also the number of the current cycle."""
        return self.ledger.cycles

    def merge(
        self, step: int, loss_fn: Callable[[], float] | None = None
    ) -> MergeReport:
        """Merge all MoRA matrices, between two optimizer steps: no gradient may be
        pending. Collective.

        `loss_fn`: the loss on a fixed batch, the same on every rank; measured before and
        after. Raises `RunError` when it moves by more than rounding explains.
        """
        model = self.engine.module
        cycle = self.cycle
        entries = layer_entries(model)
        recorded: Tensors = {}
        before = loss_fn() if loss_fn else None
        rows = self._rebuild_weights(self._matrices(recorded), is_merge=True)
        norms = gather_norms(node_base_of(model), rows, list(entries))
        self._record(step, entries, recorded)
        self.sums.commit(self.ledger.head)
        self._start_cycle(self.cycle)
        after = loss_fn() if loss_fn else None
        self.check_reference_loss(step, before, after)
        matrix_sum, delta_sum, weight_sum, lost_sum = (
            sum(norm**2 for norm in column) for column in norms.T.tolist()
        )
        return MergeReport(
            cycle=cycle,
            step=step,
            layers=len(entries),
            mora_matrix_norm=matrix_sum**0.5,
            delta_norm=delta_sum**0.5,
            weight_norm=weight_sum**0.5,
            rounding_loss=(lost_sum / delta_sum) ** 0.5 if delta_sum else 0.0,
            loss_before=before,
            loss_after=after,
        )

    def _matrices(self, recorded: Tensors) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each adapted module with its M, unsharded and in fp32.
        Rank 0 also puts a copy into `recorded`, for the ledger. Collective."""
        for name, layer in mora_layers(self.engine.module).items():
            mora_matrix = layer.unshard(zero.full_fp32(layer.adapter_weight))
            if dist.get_rank() == 0:
                recorded[name] = mora_matrix.cpu()
            yield name, mora_matrix

    def _rebuild_weights(
        self, mora_matrices: Iterable[tuple[str, Tensor | None]], is_merge: bool
    ) -> dict[str, MergeNorms]:
        """Rebuild every merged weight: its original, all deltas of the ledger, and that of
        the current cycle's M where `mora_matrices` has one. Where the processes of a
        node share the base, one of them rebuilds a layer. Returns
        {module name: norms} of the matrices that this process has merged. `is_merge`:
        whether the weights get another cycle than the ledger's."""
        if prefetcher := prefetcher_of(self.engine.module):
            # The device has copies of streamed weights, which are about to change
            prefetcher.invalidate()
        model = self.engine.module
        layers = mora_layers(model)
        node = node_base_of(model)
        written_here = layers_to_write(node, layers)
        kept_here = {
            name: layers[name].shape
            for name in written_here
            if is_first_node(node, name) and not layers[name].is_packed
        }
        self.sums.open(self.ledger, kept_here, is_merge)

        def updates(
            name: str, mora_matrix: Tensor | None, is_summed: bool = False
        ) -> Iterator[Update]:
            if not is_summed:
                yield from self.ledger.mora_matrices_of(name)
            if mora_matrix is not None:
                yield layers[name].spec, mora_matrix

        def items() -> Iterator[tuple[str, Tensor | None]]:
            for name, mora_matrix in mora_matrices:
                if name in written_here:
                    if mora_matrix is not None and node.ranks is not None:
                        # All matrices wait for the other processes, off the device
                        mora_matrix = mora_matrix.cpu()
                    yield name, mora_matrix
                elif layers[name].is_packed:
                    # Matrices next to packed weights stay in every process
                    layers[name].set_merged(updates(name, mora_matrix))

        def rebuild_layer(name: str, mora_matrix: Tensor | None) -> MergeNorms | None:
            layer = layers[name]
            start = self.sums.read(name, layer.shape)
            is_summed = start is not None
            if start is None:
                start = self.base.read(self.keys[layer.spec.weight_name(name)])
            keep = partial(self.sums.write, name)
            if mora_matrix is None:
                layer.rebuild_weight(start, updates(name, None, is_summed), keep)
                return None
            mora_matrix = mora_matrix.to(layer.device)
            new = updates(name, mora_matrix, is_summed)
            return layer.merge(start, new, mora_matrix, keep)

        norms = rebuild_weights(node, model, items(), rebuild_layer)
        self.base.release()
        self.ledger.release()
        self.sums.release()
        return norms

    def check_reference_loss(
        self, step: int, before: float | None, after: float | None
    ) -> None:
        if before is None or after is None:
            return
        layer = next(iter(mora_layers(self.engine.module).values()))
        dtype = layer.dtype if layer.is_packed else layer.weight.dtype
        tolerance = LOSS_TOLERANCE.get(dtype, 1e-4) * max(1.0, abs(before))
        # Not `>`, which is false where a loss is not a number
        if not abs(after - before) <= tolerance:
            raise RunError(
                f"the merge at step {step} moved the loss on the reference batch from {before:.6f} to {after:.6f}, "
                f"which rounding to {dtype} does not explain: the merged model differs. Resume from the last "
                "checkpoint. If it happens again, with --compute weight in low precision, begin a new run with "
                "--compute activation: a resume keeps --compute"
            )

    def rebuild(self) -> None:
        """Rebuild the base from the ledger and set the operators of its cycle."""
        if self.cycle:
            self.rebuild_base()
        set_cycle(self.engine.module, self.config, self.cycle)

    def rebuild_base(self) -> None:
        """Rebuild every merged weight from its original and the ledger. Collective."""
        names = [(name, None) for name in mora_layers(self.engine.module)]
        self._rebuild_weights(names, is_merge=False)
        # No process reads the earlier sums any more
        dist.barrier()
        self.sums.commit(self.ledger.head)

    def _record(
        self,
        step: int,
        entries: Layers,
        mora_matrices: Tensors,
    ) -> None:
        """Rank 0 appends the cycle to the ledger, and tells the others its hash and
        size."""

        def append() -> tuple[str, int]:
            self.ledger.append(step, entries, mora_matrices.items())
            record = self.ledger.records[-1]
            return record.sha256, record.size

        ranks = Ranks.current()
        # All ranks meet there: rank 0, which goes on to delete earlier sums, does not
        # pass ranks that still read them
        sha256, size = ranks.run_on_rank0("merge ledger", append, long=True)
        if not ranks.is_rank0:
            self.ledger.follow(step, sha256, size)

    def _start_cycle(self, cycle: int) -> None:
        """Zero matrices, master weights and optimizer state, and set the cycle's operators."""
        layers = mora_layers(self.engine.module)
        zero.reset_group(self.engine, 0)
        set_cycle(self.engine.module, self.config, cycle)
        init_weights = {}
        for name, layer in layers.items():
            seed = self.config.first_seed(name, cycle)
            first = layer.spec.init_weight(layer.frozen, seed)
            # LoRA's A; MoRA matrices are zero, as `reset_group` leaves them
            if first.any():
                init_weights[layer.adapter_weight] = layer.shard(first)
        if init_weights:
            zero.set_fp32(self.engine, init_weights)


# -- which process writes which weight -------------------------------------------------


def layers_to_write(node: NodeBase, layers: Mapping[str, AdaptedLinear]) -> list[str]:
    """Names of the layers whose frozen weights this process writes: its part of those
    that the processes of its node share, and all others, which lie on its device."""
    shared = {
        name: layer.weight.numel()
        for name, layer in layers.items()
        if node.shares(name)
    }
    written_here = set(node.written_here(shared))
    return [name for name in layers if name in written_here or name not in shared]


def rebuild_weights(
    node: NodeBase,
    model: nn.Module,
    items: Iterable[tuple[str, Tensor | None]],
    work: Callable[[str, Tensor | None], MergeNorms | None],
) -> dict[str, MergeNorms]:
    """{name: work(name, item)} for this process's `layers_to_write`, without None;
    `work` writes a weight.

    Collective, if `items` are, or if any processes share a base: all then have their
    items before the first weight is written, when no process reads the old ones any
    more, and an error of one process is one of all.
    """

    def rebuild() -> dict[str, MergeNorms]:
        results = ((name, work(name, item)) for name, item in items)
        return {name: norms for name, norms in results if norms is not None}

    if node.ranks is None:
        return rebuild()
    items = list(items)

    def check() -> None:
        frozen = frozen_buffers(model)
        if any(frozen.get(name) is not slot for name, slot in node.slots.items()):
            raise RunError(
                "frozen weights were replaced after the start: they are not those that processes share"
            )

    node.ranks.agree("start of the rebuilding of the base", check, long=True)
    return node.ranks.agree("rebuilding of the base", rebuild, long=True)


def gather_norms(
    node: NodeBase, norms: Mapping[str, MergeNorms], names: Sequence[str]
) -> Tensor:
    """A table (names, fields of `MergeNorms`) in fp32 on the CPU, the same on every
    process. `norms`: of this process's `layers_to_write`. Collective where
    `rebuild_weights` is."""
    table = torch.zeros(len(names), len(MergeNorms._fields))
    for index, name in enumerate(names):
        # A row is added once: other nodes have the same, and so have the processes of
        # this one where nothing is shared
        if name in norms and (node.ranks is None or is_first_node(node, name)):
            table[index] = torch.stack(list(norms[name]))
    return table if node.ranks is None else node.ranks.sum(table)


def is_first_node(node: NodeBase, layer: str) -> bool:
    """Whether this process is rank 0, or for a weight that processes share whether rank
    0 is among them: one process of the run that writes the weight."""
    if node.shares(layer):
        return 0 in node.members
    return dist.get_rank() == 0 if node.ranks is None else node.ranks.is_rank0
