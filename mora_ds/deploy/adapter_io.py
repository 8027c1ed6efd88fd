"""An adapter without its run: exported from a checkpoint, and put onto the base again.

    export_adapter(checkpoint, folder)      adapter.json, adapter.safetensors, base.json, ledger/, manifest.json, and
                                            tokenizer/ where the checkpoint has one
    model = load_adapter(base, folder)      a Hugging Face model whose weights are the run's live ones, bit for bit

The model keeps its MoRA matrices: it can be run, trained on (`mora_ds.initialize`) or
inspected. `export_merged` writes a plain model instead. `load_adapter` takes a
checkpoint as well as what `export_adapter` made of it.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mora_ds.adapters.domains import DomainLinear, domains_of
from mora_ds.adapters.inject import inject, mora_layers, move_base
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.checkpoint.adapter_files import Adapter, BaseReference, chosen_domain
from mora_ds.checkpoint.layout import (
    ADAPTER_JSON,
    ADAPTER_TENSORS,
    LEDGER_FOLDER,
    TOKENIZER_FOLDER,
    find_adapter,
    tokenizer_of,
)
from mora_ds.common.errors import UserError
from mora_ds.common.files import (
    as_path,
    atomic_folder,
    copy_folder,
    require_new,
    require_outside,
    write_manifest,
)
from mora_ds.common.nested import different_keys
from mora_ds.common.tensor_files import Shape, compute_dtype
from mora_ds.models.load import load_model


def export_adapter(checkpoint: Path | str, output: Path | str) -> list[str]:
    """Write the adapter of a checkpoint (or of a run's latest one) to the new folder
    `output`: no optimizer state, no random states, no base. Returns lines to print.
    Raises `UserError` for a damaged checkpoint or a folder that holds something."""
    output = as_path(output, "export_adapter: `output`")
    require_new(output)
    checkpoint = as_path(checkpoint, "export_adapter: `checkpoint`")
    adapter = Adapter.open(find_adapter(checkpoint))
    source = adapter.folder
    require_outside(output, source)
    with atomic_folder(output.absolute()) as folder:
        for name in (ADAPTER_JSON, ADAPTER_TENSORS):
            shutil.copyfile(source / name, folder / name)
        adapter.ledger.copy_to(folder / LEDGER_FOLDER)
        complete(folder, source, adapter.reference.absolute(source))
    contents = (
        f"{len(adapter.file.layers)} layers, {adapter.ledger.cycles} merged cycle(s)"
    )
    return [f"wrote {output}: {contents}"]


def complete(folder: Path, source: Path, reference: BaseReference) -> None:
    """Add to an adapter's tensors and ledger in `folder` what else it has: the base's
    name, the tokenizer of the adapter `source`, and the manifest."""
    reference.write(folder)
    if tokenizer := tokenizer_of(source):
        copy_folder(tokenizer, folder / TOKENIZER_FOLDER)
    write_manifest(folder)


def _sides(operator: UpdateSpec) -> tuple[type, int, int, Shape]:
    return type(operator), operator.d_in, operator.d_out, operator.adapter_weight_shape


@torch.no_grad()
def load_adapter(
    base: Path | str,
    adapter: Path | str,
    attn_implementation: str | None = None,
    domain: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The base with the adapter, in the run's dtype, on the CPU, in evaluation mode.

    `base` is the model's folder, whose fingerprint must be the recorded one. Of an
    adapter with domains the model has the MoRA matrices of all, and computes as
    `domain`, by default with the shared matrices alone (`domains_of(model)` changes
    that at any time). Raises `UserError` when something is damaged or does not fit.
    """
    if not isinstance(base, (str, os.PathLike)):
        raise UserError(
            f"load_adapter: `base` must be the model's folder, got a {type(base).__name__}"
        )
    folder = find_adapter(as_path(adapter, "load_adapter: `adapter`"))
    opened = Adapter.open(folder)
    facts = opened.file
    dtype = compute_dtype(facts.dtype)
    chosen = (
        None if domain is None else chosen_domain(facts.domains, domain, "`domain`")
    )
    config = facts.config
    if any(pattern.startswith("re:") for pattern in config.target_modules):
        # The layers are known: no regular expression is tried, which might run for
        # years.
        config = replace(config, target_modules=tuple(facts.layers))
    files = opened.reference.open_base(folder, Path(base), "`base`")
    model = load_model(
        files.folder,
        dtype,
        attn_implementation,
        trust_remote_code,
        "`base`",
        opened.reference.config_changes,
    )
    inject(model, config)
    move_base(model, "cpu", dtype)
    # The names in the file are those of the model's parameters: matrices, those of
    # domains, other trained tensors.
    tensors = dict(opened.tensors.items())
    for name, layer in mora_layers(model).items():
        key = f"{name}.{layer.spec.adapter_weight_name}"
        if layer.fixed is not None and key in tensors:
            layer.set_fixed(tensors[key])
            tensors[key] = layer.spec.trained(tensors[key])
    parameters = dict(model.named_parameters())
    shapes_there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes_here = {
        name: tuple(parameter.shape) for name, parameter in parameters.items()
    }
    for name in different_keys(shapes_there, shapes_here):
        raise UserError(
            f"{folder} does not fit this model: the shape of {name} is {shapes_there.get(name)} there, "
            f"{shapes_here.get(name)} here"
        )
    for name, tensor in tensors.items():
        parameters[name].data = tensor.to(dtype)
    for name, layer in mora_layers(model).items():
        operators = [facts.layers[name].operator]
        if facts.domains is not None:
            operators.append(facts.domains.operators[name])
        for operator in operators:  # the shape of M does not say the sides of its layer
            if _sides(operator) != _sides(layer.spec):
                raise UserError(
                    f"{folder} does not fit this model: its operator of {name} is of another shape"
                )
        layer.spec = facts.layers[name].operator
        original = files.read(opened.original_key(files, facts.layers[name].weight))
        layer.rebuild_weight(original, opened.ledger.mora_matrices_of(name))
        if facts.domains is not None:
            assert isinstance(layer, DomainLinear)
            layer.own_spec = facts.domains.operators[name]
    domains_of(model).set_all(chosen)
    return model.eval()
