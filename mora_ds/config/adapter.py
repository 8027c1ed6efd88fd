"""Settings of the adapter: what is trained, and when it is merged.

The configs of adapters, which import torch, are imported where one is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from mora_ds.adapters.registry import (
    ADAPTERS,
    DEFAULT_ADAPTER,
    AdapterType,
    Capability,
    Control,
    adapter_type,
    loaded,
    unsupported,
)
from mora_ds.adapters.target_patterns import ALL_LINEAR, names_experts
from mora_ds.common.errors import named_as_flags, unknown, validation_errors_of
from mora_ds.config.flags import documented

if TYPE_CHECKING:
    from mora_ds.adapters.config import AdapterConfig


@dataclass(frozen=True)
@documented
class AdapterArguments:
    """What is trained, and when it is merged."""

    adapter: str = DEFAULT_ADAPTER
    """An adapter: mora (MoRA matrices), lora (with --merge_every: ReLoRA) or subspace
    (MoRA matrices between singular vectors of the weights). Or a control: full (every
    parameter, under plain ZeRO), none (nothing is trained, the base is evaluated)."""
    mora_rank: int = 8
    """Rank of --adapter lora. With mora: each MoRA matrix has at most as many parameters
    as a LoRA of this rank; its side is r_hat = sqrt((d_in + d_out) * mora_rank),
    rounded down to a multiple of --r_hat_multiple."""
    r_hat_multiple: int = 16
    """Sides of MoRA matrices are rounded down to a multiple of this; those below twice
    this, to an even number. 1: any side that the operator takes."""
    lora_alpha: float | None = None
    """The update of LoRA is B A times --lora_alpha / --mora_rank. Default: twice the
    rank."""
    operator: str = "auto"
    """truncate, share, decouple, rotate, or auto: rotate for ranks below 64, share from
    there on."""
    grouping: str = "permuted"
    """permuted (new permutations in every cycle), alternate (the paper's for share:
    strided and contiguous in turn), plain, or one for share only: strided, contiguous,
    contiguous-strided, strided-contiguous."""
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Modules that are adapted: names, globs, regular expressions after re:, all-linear
    (every linear layer that text trains, except the head), experts (all experts of a
    mixture, which no pattern without this word reaches)."""
    compute: str = "auto"
    """activation (the update is applied to the activations), weight (a weight W0 +
    update is formed, rounded to the run's dtype) or auto: weight for each layer where
    d_in * d_out <= 2 * tokens * (d_in + d_out), for the tokens of a micro-batch, which
    is about where it is the cheaper path."""
    base_bits: int = 16
    """8: hold the frozen weights of adapted layers in int8 with a scale per output,
    half of the memory of bf16; merges and exports read the base weights. 4: in NF4,
    0.28 of the memory; they are rounded once, and merged cycles act through their
    matrices, so that every merge makes a step longer; needs the extra bits4. 16: hold
    them in the run's dtype."""
    mora_dropout: float = 0.0
    """Dropout on the adapter's input, at least 0 and below 1."""
    train_embeddings: bool = False
    """Train the input embeddings too (sharded by ZeRO like the MoRA matrices)."""
    train_new_embeddings: bool = False
    """Train the rows that mora-ds extend-vocab added to embeddings and head, and keep
    the others frozen."""
    train_embedding_rank: int = 0
    """Train a product of this rank (tokens x rank times rank x width) that is added to
    embeddings and head, and keep their own weights frozen; 0 turns this off."""
    train_norms: bool = False
    """Train the norms too."""
    train_head: bool = False
    """Train the output head too."""
    merge_every: int = 0
    """ReMoRA: optimizer steps between merges; 0: never merge."""
    restart_warmup_steps: int = 10
    """Optimizer steps of the re-warmup: the learning rate rises again after a merge
    (the paper: 50 of 2000)."""

    @property
    def is_control(self) -> bool:
        """Whether the run has no adapter."""
        return self.adapter in list(Control)

    @property
    def trains_others(self) -> bool:
        """Whether parameters other than the adapter's are trained (PEFT's
        modules_to_save)."""
        rows = self.train_new_embeddings or self.train_embedding_rank > 0
        needed = not self.is_control and adapter_type(self.adapter).trainables
        modules = self.train_embeddings or self.train_norms or self.train_head
        return bool(rows or modules or needed)

    @property
    def adapts_experts(self) -> bool:
        """Whether the targets name experts of a mixture."""
        return any(names_experts(pattern) for pattern in self.target_modules)

    def config(self, seed: int) -> AdapterConfig:
        """The adapter's own config. Raises `UserError` for invalid settings, and for
        an adapter that is not registered."""
        adapter = adapter_type(self.adapter)
        given = vars(self)
        values = {
            name: given[setting]
            for setting, name in settings_of(adapter).items()
            # The rows that are new are known with the model
            if setting in given and setting != "train_new_embeddings"
        }
        config: AdapterConfig = loaded(adapter.config)(**values, seed=seed)
        return config

    def problems(self) -> Iterator[str]:
        """What is wrong with these settings alone, one message each."""
        known = [*ADAPTERS, *(control.value for control in Control)]
        if self.adapter not in known:
            yield unknown("--adapter", self.adapter, known)
            return
        if self.is_control:
            return
        from mora_ds.adapters.config import FLAGS

        yield from validation_errors_of(named_as_flags(**FLAGS)(self.config), 0)
        if self.adapts_experts:
            setting = "--target_modules names experts"
            yield from unsupported(self.adapter, Capability.EXPERTS, setting)


def settings_of(adapter: AdapterType) -> dict[str, str]:
    """Setting of a run -> field of the adapter's config that has it."""
    from mora_ds.adapters.config import FLAGS

    names = [entry.name for entry in fields(loaded(adapter.config))]
    return {FLAGS.get(name, name).removeprefix("--"): name for name in names}
