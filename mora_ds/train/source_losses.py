"""The training loss of every source of a mixture, exact over micro-batches and ranks.

Each rank adds up what its rows say; the sums travel in the collective that carries the step's loss anyway: two numbers
a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mora_ds.data import IGNORED
from mora_ds.train.metrics import perplexity


class SourceLosses:
    """Of one optimizer step. `names` are the sources'."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._sums: Tensor | None = None

    def reset(self) -> None:
        """A step begins."""
        self._sums = None

    def add(self, sources: Sequence[int], row_nll: Tensor, labels: Tensor) -> None:
        """A micro-batch: (B,) source of each row, (B,) its summed loss, (B, T) its labels, here or of this part."""
        predicted = (labels != IGNORED).sum(dim=-1)
        values = torch.stack([row_nll.detach().double(), predicted.double()])
        if self._sums is None:  # where the losses are: nothing waits for the device before `sums`
            self._sums = values.new_zeros(2, len(self.names))
        self._sums.index_add_(1, torch.tensor(sources, device=values.device), values)

    def sums(self) -> list[float]:
        """This rank's, to be added up over all ranks: losses, then predicted tokens."""
        return [] if self._sums is None else self._sums.flatten().tolist()

    def facts(self, sums: Sequence[float], tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        """{source: loss, perplexity, tokens} from the sums over all ranks; no loss where the step had none of it.
        `tokens`: of each source since the run's first step."""
        nll, predicted = torch.tensor(sums, dtype=torch.float64).view(2, -1).tolist()
        facts = {}
        for name, value, count in zip(self.names, nll, predicted, strict=True):
            loss = value / count if count else None
            ppl = None if loss is None else perplexity(loss)
            facts[name] = {"loss": loss, "perplexity": ppl, "tokens": tokens[name]}
        return facts
