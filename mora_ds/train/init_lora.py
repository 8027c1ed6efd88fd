"""--init_adapter with --adapter lora: a run starts from a LoRA adapter that PEFT has written.

    adapter_config.json, adapter_model.safetensors -> per layer [A | B^T], the scaling folded into B -> the engine

Formats: peft 0.21, `LoraConfig` and `get_peft_model_state_dict`. Only plain LoRA on the layers of this run is taken:
any tensor beside the factors (DoRA's magnitudes, biases, modules_to_save) would be left out, and is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.common.errors import UserError
from mora_ds.common.files import read_json
from mora_ds.common.untrusted import entry, expanded
from mora_ds.deploy.peft_export import CONFIG_FILE, FINGERPRINT, PREFIX, WEIGHTS_FILE
from mora_ds.engine import zero
from mora_ds.models.tensor_files import open_safetensors, shape_dtype
from mora_ds.train.init_adapter import FLAG

_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class LoRASettings:
    """What adapter_config.json says of the factors' scaling. Read it with `LoRASettings.read`."""

    folder: Path
    alpha: float
    is_rank_stabilised: bool
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Layer name, or its last parts -> alpha, where it differs."""

    @classmethod
    def read(cls, path: Path) -> LoRASettings:
        """Raises `UserError` for a folder that holds no LoRA adapter of PEFT."""
        folder = expanded(path, FLAG)
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{FLAG} {path}: no folder that PEFT wrote: it has no {CONFIG_FILE}")
        content, where = read_json(folder / CONFIG_FILE), folder / CONFIG_FILE
        if (kind := content.get("peft_type")) != "LORA":
            raise UserError(f"{FLAG} {path}: {where} is of the kind {kind!r}, no LORA")
        alphas = entry({"alpha_pattern": {}, **content}, "alpha_pattern", dict[str, float], where)
        if odd := next((key for key in alphas if not re.fullmatch(r"[\w.]+", key)), None):
            raise UserError(f"{FLAG} {path}: alpha_pattern {odd!r} is an expression: write the layers' names")
        alpha = entry(content, "lora_alpha", float, where)
        return cls(folder, alpha, bool(content.get("use_rslora")), alphas)

    def scaling(self, module: str, rank: int) -> float:
        """What PEFT multiplies B A with."""
        own = (alpha for key, alpha in self.alphas.items() if module == key or module.endswith(f".{key}"))
        return next(own, self.alpha) / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def lora_files(path: Path) -> list[Path]:
    """The files that make a LoRA adapter of PEFT. Raises `UserError` where there is none."""
    folder = LoRASettings.read(path).folder
    return [folder / CONFIG_FILE, folder / WEIGHTS_FILE]


@dataclass(frozen=True)
class InitialLoRA:
    """The factors of a LoRA adapter that fits a model. Make it with `InitialLoRA.open`."""

    folder: Path
    values: Mapping[str, Tensor]
    """Module name -> [A | B^T] (rank, d_in + d_out), fp32."""
    of_known_base: bool
    """Whether the file says which base it belongs to; its fingerprint is then the run's."""

    @classmethod
    def open(cls, path: Path, model: nn.Module, fingerprint: str) -> InitialLoRA:
        """Raises `UserError` naming what does not fit. `fingerprint`: of the model's base."""
        settings = LoRASettings.read(path)
        handle = open_safetensors(settings.folder / WEIGHTS_FILE)
        recorded = (handle.metadata() or {}).get(FINGERPRINT)
        if recorded not in (None, fingerprint):
            raise UserError(f"{FLAG} {path} is an adapter of another base: fingerprint {recorded}, not {fingerprint}")
        found = {name: _FACTOR.fullmatch(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)
        if others := sorted(name for name, match in found.items() if match is None):
            raise UserError(
                f"{FLAG} {path}: {WEIGHTS_FILE} holds {others[0]}, which --adapter lora does not start from: merge "
                "that adapter into its base by PEFT's merge_and_unload, and start from that model"
            )
        layers = mora_layers(model)
        if different := sorted({match[1] for match in found.values() if match} ^ set(layers)):
            raise UserError(f"{FLAG} {path} adapts other layers (--target_modules), e.g. {different[0]}")
        values = {}
        for name, layer in layers.items():
            assert isinstance(layer.spec, LoRASpec)
            values[name] = _value(path, settings, handle, name, layer.spec)
        return cls(settings.folder, values, recorded is not None)

    def put(self, engine: zero.Engine) -> str:
        """Copy the factors into the engine's model, fp32 masters included. Returns a line for the log."""
        for name, layer in mora_layers(engine.module).items():
            zero.set_fp32(engine, layer.value, self.values[name])
        doubt = "" if self.of_known_base else "; it does not say of which weights, only their shapes were compared"
        return f"LoRA factors of {self.folder}{doubt}"


def _value(path: Path, settings: LoRASettings, handle: Any, module: str, spec: LoRASpec) -> Tensor:
    """[A | B^T] of a layer, with B multiplied so that this run's scaling gives PEFT's update."""
    down, up = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
    if missing := {down, up} - set(handle.keys()):
        raise UserError(f"{FLAG} {path}: {WEIGHTS_FILE} holds no {min(missing)}")
    shapes = shape_dtype(handle, down)[0], shape_dtype(handle, up)[0]
    rank = shapes[0][0] if shapes[0] else 0
    if shapes != ((rank, spec.d_in), (spec.d_out, rank)):
        raise UserError(f"{FLAG} {path}: the factors of {module} have the shapes {shapes}, for another base")
    if rank != spec.rank:
        raise UserError(f"{FLAG} {path}: the factors of {module} have rank {rank}, not {spec.rank}: --mora_rank {rank}")
    scale = settings.scaling(module, rank) / (spec.alpha / spec.rank)
    value = torch.cat([handle.get_tensor(down).float(), scale * handle.get_tensor(up).float().T], dim=1)
    if not torch.isfinite(value).all():
        raise UserError(f"{FLAG} {path}: the factors of {module} are not finite")
    return value
