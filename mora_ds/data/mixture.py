"""Several named sources -> batches with exact shares; like `PackedDataset`'s a pure function of the step.

    sample i  --shares.Shares-->  (source, number n of its samples)  --the source's own order-->  block

Each source has an order of its own, drawn from (seed, name, epoch), so that adding one does not reorder another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mora_ds.data.packing import PackedDataset, stack
from mora_ds.data.shares import Phase, Shares
from mora_ds.errors import UserError

Block = dict[str, np.ndarray]


class Source(Protocol):
    """One source of a mixture, packed."""

    @property
    def n_blocks(self) -> int | None:
        """Sequences an epoch, or None where only reading to the end would tell."""
        ...

    @property
    def identity(self) -> Any: ...

    def sample(self, number: int) -> Block:
        """Sample `number` of this source's endless order: input_ids, labels, position_ids, each int64 (T,)."""
        ...

    def probe(self, index: int) -> Block:
        """One of its first sequences, the same at every step of every run."""
        ...


class CachedSource:
    """A source whose tokens lie on disk."""

    def __init__(self, packed: PackedDataset) -> None:
        self.packed = packed

    @property
    def n_blocks(self) -> int:
        return self.packed.n_blocks

    @property
    def identity(self) -> Any:
        return self.packed.identity["tokens"]

    def sample(self, number: int) -> Block:
        return self.packed.blocks.block(self.packed.block_of_sample(number))

    def probe(self, index: int) -> Block:
        return self.packed.blocks.block(index % self.n_blocks)


class Mixture:
    """Batches of several sources.

    `phases`: (step, weights) from which on the weights hold, the first at step 0. `epochs[k]`: how often source k may
    be read, None for any number; where it is used up the others share what it had.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        phases: Sequence[tuple[int, Sequence[float]]],
        epochs: Sequence[float | None],
        seq_len: int,
        rows_per_step: int,
    ) -> None:
        self.names, self.sources = list(sources), list(sources.values())
        self.seq_len, self.rows_per_step = seq_len, rows_per_step
        self._phases, self._epochs = [(step, list(weights)) for step, weights in phases], list(epochs)
        caps = [
            None if limit is None or source.n_blocks is None else int(limit * source.n_blocks)
            for source, limit in zip(self.sources, epochs, strict=True)
        ]
        self.shares = Shares([Phase(step * rows_per_step, tuple(weights)) for step, weights in phases], caps)

    @property
    def n_blocks(self) -> int:
        """Sequences of all sources together, each read once; streams count as nothing."""
        return sum(source.n_blocks or 0 for source in self.sources)

    @property
    def max_steps(self) -> int | None:
        """Whole batches until all sources are used up; None where one is endless."""
        return None if self.shares.limit is None else self.shares.limit // self.rows_per_step

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must agree on."""
        sources = {name: source.identity for name, source in zip(self.names, self.sources, strict=True)}
        weights = {f"from step {step}": dict(zip(self.names, part, strict=True)) for step, part in self._phases}
        epochs = dict(zip(self.names, self._epochs, strict=True))
        return {"mixture": {"sources": sources, "weights": weights, "epochs": epochs}}

    def first_rows(self, count: int) -> dict[str, Tensor]:
        """`count` sequences of the first source, for what must be the same in every step."""
        return stack([self.sources[0].probe(index) for index in range(count)])

    def check_batch_size(self, global_batch_size: int) -> None:
        """Raises `UserError` when all sources together do not fill one global batch."""
        if self.max_steps == 0:
            raise UserError(
                f"the mixture is shorter than one batch of {global_batch_size} sequences: give more text or more epochs"
            )

    def batch(self, step: int, global_batch_size: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Rows `rows` of step `step`'s global batch: input_ids, labels, position_ids, each int64 (rows, T)."""
        return stack([self._sample(sample) for sample in self._samples(step, global_batch_size)[rows]])

    def sources_of(self, step: int, global_batch_size: int, rows: slice = slice(None)) -> list[int]:
        """(rows,) which source each of those rows comes from."""
        return [self.shares.locate(sample)[0] for sample in self._samples(step, global_batch_size)[rows]]

    def tokens(self, steps: int) -> dict[str, int]:
        """How many tokens of each source the first `steps` batches hold."""
        counts = self.shares.counts(steps * self.rows_per_step)
        return {name: int(count) * self.seq_len for name, count in zip(self.names, counts, strict=True)}

    def _samples(self, step: int, global_batch_size: int) -> range:
        assert global_batch_size == self.rows_per_step, "phases begin at steps of this batch size"
        return range(step * global_batch_size, (step + 1) * global_batch_size)

    def _sample(self, sample: int) -> Block:
        source, number = self.shares.locate(sample)
        return self.sources[source].sample(number)


TrainData = PackedDataset | Mixture
"""What a run trains on."""
