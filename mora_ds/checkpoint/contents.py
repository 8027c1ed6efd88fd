"""What a run writes into a checkpoint besides the engine's shards: adapter, merge ledger, base reference, tokenizer
and probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mora_ds.adapters.domains import domain_layers, domains_of, frozen_values
from mora_ds.adapters.inject import mora_layers, value_names
from mora_ds.checkpoint.adapter_files import AdapterFile, BaseReference, DomainSquares, logits_name, write_adapter
from mora_ds.checkpoint.layout import LEDGER_FOLDER, PROBE_FILE, TOKENIZER_FOLDER
from mora_ds.common.files import copy_folder
from mora_ds.engine import zero
from mora_ds.models.base import write_own_base
from mora_ds.models.tensor_files import write_safetensors_atomic
from mora_ds.parallel.ulysses import whole_rows
from mora_ds.remora.merge import ReMoRA, layer_entries

PROBE_TOKENS = 8
"""Length of the one row of the recorded probe; its logits take 4 * PROBE_TOKENS * vocabulary bytes."""


@dataclass
class RunWriter:
    """Writes the files of a run with an adapter. Call it on all ranks: MoRA matrices are gathered one by one."""

    remora: ReMoRA
    base: BaseReference
    tokenizer_folder: Path | None
    probe_ids: Tensor
    """(1, PROBE_TOKENS) token ids whose logits are recorded for `export --verify`."""
    facts: dict[str, Any]

    @property
    def engine(self) -> zero.Engine:
        return self.remora.engine

    def collect(self, step: int) -> Callable[[Path], None]:
        """Gathers everything onto rank 0. The returned function writes it, however training changes it meanwhile."""
        model = self.engine.module
        layers = mora_layers(model)
        others = other_trainables(model)
        squares = dict(self._gathered({name: (layer.value, layer.unshard) for name, layer in layers.items()}))
        trained = dict(self._gathered({name: (parameter, _as_it_is) for name, parameter in others.items()}))
        of_domains = {name: layer.domain_squares for name, layer in domain_layers(model).items()}
        domain_squares = dict(self._gathered({name: (squares, _as_it_is) for name, squares in of_domains.items()}))
        probe = self._probe()
        adapter = self._adapter_file(step, tuple(trained))
        ledger = self.remora.ledger.snapshot()

        def write(folder: Path) -> None:
            if dist.get_rank() != 0:
                return
            write_adapter(folder, adapter, squares, trained, domain_squares)
            self.base.write(folder)
            ledger.copy_to(folder / LEDGER_FOLDER)
            if self.tokenizer_folder is not None:  # no links: one damaged file would be damaged in every checkpoint
                copy_folder(self.tokenizer_folder, folder / TOKENIZER_FOLDER)
            write_safetensors_atomic(folder / PROBE_FILE, probe, {"dtype": self.base.dtype})

        return write

    def _probe(self) -> dict[str, Tensor]:
        """The recorded tokens, and their logits with the shared matrices alone and for every domain."""
        domains = domains_of(self.engine.module)
        probe = {"input_ids": self.probe_ids.cpu().long()}
        for domain in (None, *domains.names):
            with domains.using(domain):
                probe[logits_name(domain)] = probe_logits(self.engine, self.probe_ids).cpu()
        return probe

    def _gathered(
        self, parameters: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, complete fp32 tensor) on rank 0; the other ranks only take part. `parameters` gives with each one the
        function that completes a tensor-parallel rank's share. Frozen ones are buffers, complete and fp32 already."""
        for name, (value, complete) in parameters.items():
            whole = complete(zero.full_fp32(self.engine, value) if isinstance(value, nn.Parameter) else value)
            if dist.get_rank() == 0:
                yield name, whole.to("cpu", copy=True)

    def _adapter_file(self, step: int, trainables: tuple[str, ...]) -> AdapterFile:
        return AdapterFile(
            layers=layer_entries(self.engine.module),
            config=self.remora.config,
            dtype=self.base.dtype,
            cycle=self.remora.cycle,
            step=step,
            trainables=trainables,
            domains=_domain_squares(self.engine.module),
            facts=self.facts,
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def other_trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameter name -> trained embeddings, norms, head (each tied tensor under its first name)."""
    squares = value_names(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in squares}


def _domain_squares(model: nn.Module) -> DomainSquares | None:
    """The entry "domains" of adapter.json, if the model has domains."""
    layers = domain_layers(model)
    if not layers:
        return None
    operators = {name: layer.own_spec for name, layer in layers.items()}
    return DomainSquares(domains_of(model).names, operators, tuple(frozen_values(model)))


@torch.no_grad()
def probe_logits(engine: zero.Engine, ids: Tensor) -> Tensor:
    """(1, T, vocabulary) in fp32, without dropout. Collective under ZeRO-3."""
    was_training = engine.training
    engine.eval()
    with whole_rows(engine.module):
        logits = engine(input_ids=ids.to(engine.device), use_cache=False).logits.float()
    engine.train(was_training)
    return logits


def save_full_model(engine: zero.Engine, folder: Path, tokenizer: Any) -> None:
    """Writes a fully trained model as a Hugging Face folder, gathered one parameter at a time onto rank 0."""
    model = engine.module
    gathered: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with zero.whole_parameter(engine, parameter):
            if dist.get_rank() == 0:
                gathered[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        write_own_base(model, folder, tokenizer, state_dict=gathered)
    dist.barrier()
