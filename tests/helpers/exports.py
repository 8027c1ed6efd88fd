"""A checkpoint made without any training, and the model that its export must be."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.index_tables import mora_matrix_size
from mora_ds.adapters.ops.mora import OperatorSpec, mora_update
from mora_ds.adapters.ops.spec import Grouping, OperatorKind, permutation_seed
from mora_ds.checkpoint.adapter_files import AdapterFile, read_adapter
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common import files
from mora_ds.common.tensor_files import COMPUTE_DTYPES, write_safetensors_atomic
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.models.base import BaseCheckpoint
from mora_ds.remora.ledger import LayerEntry
from tests.helpers.adapters import Maker, summed
from tests.helpers.models import tiny_model, tokens

KINDS = tuple(OperatorKind)


def exported_and_live(user, out, merged, summary):
    """The export of a run in bf16 with two merges and the model of its last checkpoint,
    which compute the same. `summary`: of the run, which has learned and gathered nothing
    of its base."""
    assert (summary["merges"], summary["base_bytes_gathered"]) == (2, 0)
    before = summary["perplexity_before"]["held"]
    assert summary["perplexity_after"]["held"] < 0.99 * before, "it learns"
    assert export_merged(out, merged, verify=True).cycles == 2
    exported = AutoModelForCausalLM.from_pretrained(merged)
    live = load_adapter(user.model, out)
    ids = tokens(3)
    torch.testing.assert_close(exported(ids).logits, live(ids).logits, atol=0.1, rtol=0)
    return exported, live


@dataclass
class FakeRun:
    """A run's output folder, and what its export must hold."""

    output: Path
    checkpoint: Path
    base: Path
    expected: dict[str, torch.Tensor]
    """Live parameter name -> value, in the compute dtype."""
    live: Any
    adapter: AdapterFile
    mora_matrices: dict[str, torch.Tensor]


def fake_run(
    folder,
    family="llama",
    stored="float32",
    dtype="float32",
    cycles=2,
    trained=(),
    shard="5GB",
    probe=True,
    twice=False,
    **changes,
):
    """A checkpoint after `cycles` merges and in a running cycle, made without any training.
    `twice`: the base's file holds tied weights under each of their names."""
    base_folder = folder / "base"
    checkpoint = folder / "out/checkpoints/step-000007"
    original_model = tiny_model(family, dtype=COMPUTE_DTYPES[stored], **changes)
    original_model.save_pretrained(base_folder, max_shard_size=shard)
    if twice:
        tensors = {
            name: tensor.clone() for name, tensor in original_model.state_dict().items()
        }
        save_file(tensors, base_folder / "model.safetensors", {"format": "pt"})
    (base_folder / "tokenizer_config.json").write_text('{"from": "base"}')
    compute = COMPUTE_DTYPES[dtype]
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=compute).eval()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    values = {name: parameters[name].detach().float() + 0.01 for name in trained}
    maker = Maker(model, base_folder, dtype)
    updates = maker.write(
        checkpoint,
        MoRAConfig(),
        cycles,
        trained=values,
        dtype=dtype,
        layers_of=partial(layers_of, model),
        facts={"note": "a | b"},
    )
    replace(maker.reference, folder=os.path.relpath(base_folder, checkpoint)).write(
        checkpoint
    )
    adapter = read_adapter(checkpoint)
    base = BaseCheckpoint.open(base_folder)
    for name, entry in adapter.layers.items():
        original = base.read(maker.keys[entry.weight])
        expected[entry.weight] = summed(
            original, updates[name], entry.transposed, compute
        )
        *merged, (spec, mora_matrix) = updates[name]
        module = model.get_submodule(name)
        module.weight.data.copy_(summed(original, merged, entry.transposed, compute))
        module.register_forward_hook(add_update(spec, mora_matrix))
    for name, value in values.items():
        parameters[name].data.copy_(value)
        for twin in parameters:
            if parameters[twin] is parameters[name]:
                expected[twin] = value.to(compute)
    state = TrainerState(step=7, perplexity_before={"code": 9.5})
    files.write_json_atomic(checkpoint / "trainer_state.json", vars(state))
    if probe:
        write_probe(checkpoint, model, dtype)
    files.write_manifest(checkpoint)
    files.replace_symlink(checkpoint.parent / "latest", checkpoint.name)
    mora_matrices = {
        name: layer_updates[-1][1] for name, layer_updates in updates.items()
    }
    return FakeRun(
        folder / "out", checkpoint, base_folder, expected, model, adapter, mora_matrices
    )


def layers_of(model, cycle):
    """All linear layers but the head, with every kind of operator among them."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in name:
            transposed = isinstance(module, Conv1D)
            d_out, d_in = (
                module.weight.shape[::-1] if transposed else module.weight.shape
            )
            kind = KINDS[len(layers) % len(KINDS)]
            seed = permutation_seed(0, name, cycle)
            spec = OperatorSpec(
                kind,
                d_in,
                d_out,
                mora_matrix_size(d_in, d_out, 8, kind),
                Grouping.PERMUTED,
                seed,
            )
            layers[name] = LayerEntry(name, transposed, spec)
    return layers


def add_update(spec, mora_matrix):
    return lambda _, inputs, output: (
        output + mora_update(spec, mora_matrix.to(output.dtype), inputs[0])
    )


def write_probe(checkpoint, model, dtype):
    ids = tokens(2, 24)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits
    write_safetensors_atomic(
        checkpoint / "probe.safetensors",
        {"input_ids": ids, "logits": logits},
        {"dtype": dtype},
    )
