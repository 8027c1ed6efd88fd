"""A checkpoint as a LoRA adapter of PEFT, which servers such as vLLM load too.

    update of a layer = delta of every merged cycle + delta of the trained matrix = B A      A (k, d_in), B (d_out, k)

    lora                rank r a cycle          exact
    share, truncate     rank r_hat a cycle      exact: A holds zeros and ones, B the rows of M that outputs read
    decouple, rotate    any rank                the leading `rank` singular directions, with the energy that is lost

Factors of several cycles are concatenated, up to the layer's shorter side. Trained
embeddings, norms and heads are PEFT's `modules_to_save`. Formats: peft 0.21,
`peft/tuners/lora/config.py` and `peft/utils/save_and_load.py`.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.new_embeddings import stands_for
from mora_ds.adapters.ops.spec import UpdateSpec, additive
from mora_ds.adapters.ops.updates import merge_updates_
from mora_ds.adapters.registry import Capability, require
from mora_ds.checkpoint.adapter_files import Adapter
from mora_ds.checkpoint.layout import find_adapter
from mora_ds.common.errors import UserError
from mora_ds.common.files import (
    atomic_folder,
    read_json,
    require_new,
    require_outside,
    write_json_atomic,
)
from mora_ds.common.tensor_files import SafetensorsWriter
from mora_ds.deploy.export import MergedModelSource, open_run
from mora_ds.deploy.model_card import write_card
from mora_ds.models.svd import leading_vectors
from mora_ds.remora.ledger import LayerEntry

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's parameters."""

_NOTICEABLE = 1e-6
"""Fraction of an update's energy below which its loss is rounding."""


@dataclass(frozen=True)
class _LoRALayer:
    """How a layer's update becomes two factors."""

    entry: LayerEntry
    rank: int
    is_exact: bool
    """Whether factors of all cycles are concatenated, not the sum of deltas
    decomposed."""


@torch.no_grad()
def export_peft(
    checkpoint: Path | str,
    output: Path | str,
    rank: int | None = None,
    base_folder: Path | str | None = None,
    domain: str | None = None,
) -> list[str]:
    """Write `checkpoint` (or an exported adapter) to the new folder `output` as a LoRA
    adapter of PEFT.

    `rank`: the largest rank of a layer; None: as large as it takes to be exact.
    `base_folder`: the base, if it was moved. `domain`: as for `export_merged`. Returns
    lines to print: ranks, and the energy of the update that each layer loses. Raises
    `UserError` for a rank below 1, a rank that is missing where an update has no bound
    on its own, a folder that is not empty, and a damaged checkpoint.
    """
    source = find_adapter(Path(checkpoint))
    output = Path(output)
    if rank is not None and rank < 1:
        raise UserError(f"`rank` must be at least 1, got {rank}")
    require_new(output)
    require_outside(output, source)
    opened = Adapter.open(source)
    require(opened.file.config.adapter, Capability.PEFT_EXPORT, str(source))
    for name, entry in opened.file.layers.items():
        if len(entry.operator.weight_shape) > 2:
            raise UserError(
                f"{source}: {name} are experts, which PEFT's LoRA of linear layers cannot adapt: use mora-ds export, "
                "which merges them, or an adapter without experts in `target_modules`"
            )
    run = open_run(opened, None if base_folder is None else Path(base_folder), domain)
    _require_all_are_loaded(run)
    layers = [_lora_layer(run, entry, rank) for entry in run.file.layers.values()]
    with atomic_folder(output.absolute()) as folder:
        lost = _write_tensors(run, layers, folder)
        write_json_atomic(folder / CONFIG_FILE, _config(run, layers))
        lines = _report(run, layers, lost)
        text = "Continual pretraining with MoRA, written as a LoRA adapter. `adapter_config.json` names the base."
        if changes := run.reference.config_changes:
            text += f" The run changed the base's config: load it with {json.dumps(changes)}."
        content = [text, "", "```", *lines, "```"]
        write_card(folder, "peft", "lora, mora", "LoRA adapter", content)
    return [f"wrote {output}: LoRA of {len(layers)} layers", *lines]


def _require_all_are_loaded(run: MergedModelSource) -> None:
    """Raise `UserError` where PEFT, if installed, would leave layers out. In some
    mixtures it takes the names of their projections for those of fused experts
    (utils/transformers_weight_conversion.py, `_convert_peft_config_moe`)."""
    try:
        from peft import LoraConfig
        from peft.utils import transformers_weight_conversion
    except ImportError:
        return
    lost = set(run.file.layers)
    config: Any = LoraConfig(target_modules=list(lost))
    kind = read_json(run.base.folder / "config.json").get("model_type")
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=kind))
    # PEFT's own error: for one projection without the other
    with suppress(ValueError):
        transformers_weight_conversion.convert_peft_config_for_transformers(
            config, model, None
        )
        lost.difference_update(config.target_modules)
    if lost:
        raise UserError(
            f"PEFT would not load {len(lost)} layers, e.g. {min(lost)}, which it takes for experts of {kind}: use "
            "mora-ds export, which merges them, or an adapter without them in `target_modules`"
        )


# -- factors ---------------------------------------------------------------------------


def _lora_layer(
    run: MergedModelSource, entry: LayerEntry, limit: int | None
) -> _LoRALayer:
    side = min(entry.operator.d_in, entry.operator.d_out)
    ranks = [_bound(spec) for spec, _ in run.updates(entry)]
    total = sum(ranks)
    most = min(side, limit or side)
    if total <= most:
        return _LoRALayer(entry, int(total), True)
    if limit is None and total == math.inf:
        raise UserError(
            f"`rank` is missing: the update of {entry.module} ({entry.operator.describe()}) may have any rank up to "
            f"{side}; name how many of its leading directions to keep"
        )
    return _LoRALayer(entry, most, False)


def _bound(spec: UpdateSpec) -> float:
    """The rank that `spec.low_rank` gives; infinite where it gives no factors."""
    factors = additive(spec).low_rank(torch.zeros(spec.adapter_weight_shape))
    return math.inf if factors is None else len(factors[0])


def _factors(run: MergedModelSource, layer: _LoRALayer) -> tuple[Tensor, Tensor, float]:
    """A (rank, d_in), B (d_out, rank), and the fraction of the update's energy
    (its squared norm) that they lack."""
    spec = layer.entry.operator
    updates = run.updates(layer.entry)
    if layer.is_exact:
        downs = []
        ups = []
        for update, adapter_weight in updates:
            factors = additive(update).low_rank(adapter_weight.float())
            assert factors is not None, "an exact layer has factors of every update"
            downs.append(factors[0])
            ups.append(factors[1])
        return torch.cat(downs), torch.cat(ups, dim=1), 0.0
    delta = torch.zeros(spec.d_out, spec.d_in)
    merge_updates_(delta, updates)
    delta = delta.double()
    # B A = delta V V^T for the leading right singular vectors V: the best approximation
    # of this rank. As V is orthonormal, its energy is that of B.
    down = leading_vectors(delta, layer.rank, layer.entry.module)[1].double()
    up = delta @ down.T
    energy = delta.square().sum().item()
    lost = 1 - up.square().sum().item() / energy if energy else 0.0
    return down.float(), up.float(), max(0.0, lost)


def _write_tensors(
    run: MergedModelSource, layers: list[_LoRALayer], folder: Path
) -> dict[str, float]:
    """Write the weights' file, one layer in memory at a time. Returns the fraction that
    each layer lacks."""
    saved = dict(_saved(run))
    shapes = {name: run.base.shape_dtype(key)[0] for name, (key, _) in saved.items()}
    for layer in layers:
        module = layer.entry.module
        operator = layer.entry.operator
        shapes[f"{module}.lora_A.weight"] = (layer.rank, operator.d_in)
        shapes[f"{module}.lora_B.weight"] = (operator.d_out, layer.rank)
    lost: dict[str, float] = {}
    layout = {
        f"{PREFIX}{name}": (shape, torch.float32) for name, shape in shapes.items()
    }
    with SafetensorsWriter(folder / WEIGHTS_FILE, layout, {}) as writer:
        for layer in layers:
            module = layer.entry.module
            down, up, lost[module] = _factors(run, layer)
            writer.write(f"{PREFIX}{module}.lora_A.weight", down)
            writer.write(f"{PREFIX}{module}.lora_B.weight", up)
        for name, (key, trained) in saved.items():
            if trained is None:
                tensor = run.base.read(key).float()
            else:
                tensor = run.trained(trained, torch.float32)
            writer.write(f"{PREFIX}{name}", tensor)
    return lost


def _saved(run: MergedModelSource) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """(parameter, (key in the base, trained tensor)) of all modules with a trained
    parameter. A module is saved whole, and so is one whose parameter is tied to a
    trained one: PEFT copies a module that it saves, which unties it."""
    keys = run.reference.keys
    trained = {keys[stands_for(name)]: name for name in run.file.trainables}
    modules = {name.rpartition(".")[0] for name, key in keys.items() if key in trained}
    for name, key in keys.items():
        if name.rpartition(".")[0] in modules:
            yield name, (key, trained.get(key))


def _config(run: MergedModelSource, layers: list[_LoRALayer]) -> dict[str, Any]:
    """adapter_config.json. Alpha is the rank everywhere, so that every scaling is 1."""
    ranks = {layer.entry.module: layer.rank for layer in layers}
    largest = max(ranks.values())
    rank_pattern = {module: rank for module, rank in ranks.items() if rank != largest}
    saved = sorted({name.rpartition(".")[0] for name, _ in _saved(run)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(run.base.folder),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": rank_pattern,
        "alpha_pattern": rank_pattern,
        "target_modules": list(ranks),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(layer.entry.transposed for layer in layers),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _report(
    run: MergedModelSource, layers: list[_LoRALayer], lost: dict[str, float]
) -> list[str]:
    ranks = sorted({layer.rank for layer in layers})
    lines = [
        f"ranks {', '.join(map(str, ranks))}; servers need to allow rank {ranks[-1]}"
    ]
    if all(share <= _NOTICEABLE for share in lost.values()):
        lines.append("exact: the factors are the complete update")
    else:
        lines.append(
            f"energy of the update that is lost: {sum(lost.values()) / len(lost):.2%} on average"
        )
        lines += [f"  {module}: {share:.2%}" for module, share in lost.items()]
    if run.file.trainables:
        lines.append(
            "modules_to_save holds trained embeddings, norms or heads, which PEFT loads and vLLM refuses"
        )
    return lines
