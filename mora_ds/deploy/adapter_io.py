"""The adapter without its run: written from a checkpoint, and put onto the base by one call.

    export_adapter(checkpoint, folder)      adapter.json, adapter.safetensors, base.json, ledger/, manifest.json
    model = load_adapter(base, folder)      a Hugging Face model whose weights are the run's live ones, bit for bit

The squares stay squares: the model can be run, trained on (`mora_ds.initialize`) or looked into. A merged one without
them is what `export_merged` writes. A checkpoint is as good to `load_adapter` as what `export_adapter` made of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import AdapterConfig, config_from_dict
from mora_ds.adapters.domains import DomainLinear, domains_of, set_values
from mora_ds.adapters.inject import inject, mora_layers, move_base
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.merge_layer import write_live
from mora_ds.adapters.ops.delta import live_weight
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.checkpoint.adapter_files import AdapterFile, AdapterTensors, BaseReference, chosen_domain, read_adapter
from mora_ds.checkpoint.layout import ADAPTER_JSON, ADAPTER_TENSORS, LEDGER_FOLDER, find_adapter
from mora_ds.errors import UserError
from mora_ds.files import MANIFEST, atomic_folder, verify_manifest, write_manifest
from mora_ds.models.tensor_files import compute_dtype
from mora_ds.remora.ledger import Ledger

INCREMENTAL = "incremental"


def export_adapter(checkpoint: Path | str, output: Path | str) -> list[str]:
    """Writes the adapter of a checkpoint (or of a run's latest) to the new folder `output`: no engine state, no random
    states, no base. Returns lines for humans. Raises `UserError` for a damaged checkpoint or a folder that exists."""
    source, output = find_adapter(Path(checkpoint)), Path(output)
    if output.is_symlink() or output.exists():
        raise UserError(f"--output {output} exists already; name a new folder")
    adapter, ledger = open_adapter(source)
    reference = BaseReference.read(source)
    with atomic_folder(output.absolute()) as folder:
        for name in (ADAPTER_JSON, ADAPTER_TENSORS):
            shutil.copyfile(source / name, folder / name)
        replace(reference, folder=str((source / reference.folder).resolve())).write(folder)
        ledger.copy_to(folder / LEDGER_FOLDER)
        write_manifest(folder)
    nbytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    layers = f"{len(adapter.layers)} layers, {ledger.cycles} merged cycle(s)"
    return [f"wrote {output}: {layers}, {nbytes / 2**20:,.2f} MiB", f'mora_ds.load_adapter(base, "{output}") loads it']


@torch.no_grad()
def load_adapter(
    base: Path | str | nn.Module,
    adapter: Path | str,
    attn_implementation: str | None = None,
    domain: str | None = None,
) -> nn.Module:
    """The base with the adapter on it, in the dtype that the run computed in, on the CPU, in evaluation mode.

    `base` is the model's folder: its fingerprint must be the recorded one. Or a model, loaded in the dtype of its
    files and not changed since, which is taken as it is and changed in place. Of an adapter with domains the model
    keeps all squares, and computes as `domain`; by default as none, with the shared squares alone (`domains_of(model)`
    says otherwise at any time). Raises `UserError` when something is
    damaged or does not fit.
    """
    folder = find_adapter(Path(adapter))
    facts, ledger = open_adapter(folder)
    tensors, reference = AdapterTensors.open(folder, facts), BaseReference.read(folder)
    config, dtype = _config(folder, facts), compute_dtype(facts.dtype)
    chosen = None if domain is None else chosen_domain(facts.own, domain, "domain")
    originals: Any
    if isinstance(base, nn.Module):
        model, opened = base, None
        originals = dict(base.named_parameters(remove_duplicate=False))
    else:
        opened = reference.open_base(folder, Path(base), "base")
        model = AutoModelForCausalLM.from_pretrained(
            opened.folder, dtype=dtype, attn_implementation=attn_implementation
        )
    inject(model, config)
    move_base(model, "cpu", dtype)
    layers = mora_layers(model)
    if set(layers) != set(facts.layers):
        raise UserError(
            f"{folder} adapts other layers than this model has, e.g. {min(set(layers) ^ set(facts.layers))}"
        )
    for name, layer in layers.items():
        entry = facts.layers[name]
        original = originals[entry.weight].data if opened is None else opened.read(reference.keys[entry.weight])
        layer.spec = entry.operator
        _set_live(layer, original, ledger.squares_of(name), dtype, facts.facts.get("merge_precision") == INCREMENTAL)
        set_values(layer, tensors.square(name), tensors.own(name), dtype)
        if facts.own is not None:
            own = facts.own.operators[name]
            assert isinstance(layer, DomainLinear) and isinstance(own, OperatorSpec)
            layer.own_spec = own
    parameters = dict(model.named_parameters())
    for name in facts.trainables:
        parameters[name].data = tensors.trained(name).to(dtype)
    domains_of(model).set_all(chosen)
    return model.eval()


def _set_live(
    layer: AdaptedLinear, original: Tensor, updates: Iterable[Any], dtype: torch.dtype, step_by_step: bool
) -> None:
    """As `remora` forms it: all deltas summed and rounded once, or rounded after each."""
    original = original.clone()  # it may be the very tensor that is written to
    if not step_by_step:
        write_live(layer, original, updates)
        return
    for update in updates:
        original = live_weight(original.to(dtype), [update], layer.transposed, dtype)
    layer.weight.copy_(original)


def _config(folder: Path, adapter: AdapterFile) -> AdapterConfig:
    if "config" not in adapter.facts:
        raise UserError(f"{folder / ADAPTER_JSON} does not say how the adapter was made (no config)")
    return config_from_dict(adapter.facts["config"])


def open_adapter(folder: Path) -> tuple[AdapterFile, Ledger]:
    """Checked against its manifest, where it has one. Raises `UserError`."""
    if (folder / MANIFEST).exists() and (problems := verify_manifest(folder)):
        raise UserError("damaged: " + "; ".join(problems))
    adapter = read_adapter(folder)
    ledger = Ledger.open(folder / LEDGER_FOLDER, BaseReference.read(folder).fingerprint)
    if ledger.cycles != adapter.cycle:
        raise UserError(f"{ledger.folder} has {ledger.cycles} cycles, {folder / ADAPTER_JSON} says {adapter.cycle}")
    return adapter, ledger
