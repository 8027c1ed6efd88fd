"""MoRA's model and layer for PEFT: a linear layer with a MoRA matrix for each adapter.

Written against PEFT 0.21 (peft/tuners/tuners_utils.py); tests/peft fails if an upgrade
moves an overridden method.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.layer import is_linear, linear_shape
from mora_ds.adapters.ops.index_tables import kept_tables
from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight, mora_update
from mora_ds.common.errors import UserError, unknown
from mora_ds.peft.config import MoraConfig
from mora_ds.peft.register import PREFIX


class OperatorSeeds(BufferDict):
    """Name of the adapter -> seed of its permutations, as a buffer that is saved and
    loaded with the adapter's weights.

    The seed was drawn from the module's name when the adapter was made. A model that
    loads the adapter may name the module otherwise (`key_mapping`, `AutoModel` for a
    `ForCausalLM`), so that the seed must not be drawn again from the new name.
    """

    def __init__(self, specs: dict[str, OperatorSpec]) -> None:
        """`specs`: the layer's operators, which get the loaded seeds."""
        super().__init__(persistent=True)
        self.specs = specs

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers assigns loaded tensors (core_model_loading.py,
        # set_param_for_module).
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", {}):
            self._use(name)

    def _load_from_state_dict(self, *arguments: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*arguments, **kwargs)
        for adapter in self._buffers:
            self._use(adapter)

    def _use(self, adapter: str) -> None:
        """Give the operator of an adapter the seed of its buffer."""
        seed = self._buffers[adapter]
        if seed is not None and not seed.is_meta:
            spec = self.specs[adapter]
            self.specs[adapter] = replace(spec, seed=int(seed))


class MoraLinear(nn.Module, BaseTunerLayer):
    """y = W0 x + b + sum over active adapters of decompress(M compress(dropout(x))).

    Input (..., d_in), output (..., d_out). `base_layer` is an `nn.Linear` or `Conv1D`;
    `merge` changes its weight.
    """

    # "Linear" must be in the name of this class, because PEFT's all-linear finds layers
    # with adapters by it.
    adapter_layer_names = ("mora_matrix",)
    other_param_names = ("mora_seed", "mora_spec", "mora_dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(base_layer)
        self.mora_matrix = nn.ParameterDict()
        """Adapter name -> M (r_hat, r_hat)."""
        self.mora_dropout = nn.ModuleDict()
        self.mora_spec: dict[str, OperatorSpec] = {}
        self.mora_seed = OperatorSeeds(self.mora_spec)
        self.merged_adapters: list[str] = []

    def add(self, adapter: str, config: MoraConfig, name: str) -> None:
        """Add an adapter. `name`: the name of the layer in its model."""
        spec = config.adapter(name).operator_for(
            name, self.in_features, self.out_features, config.cycle
        )
        self.set_operator(adapter, spec)
        self.mora_dropout[adapter] = nn.Dropout(config.mora_dropout)
        mora_matrix = torch.zeros(spec.r_hat, spec.r_hat)
        if not config.init_weights:
            mora_matrix.normal_(std=0.02)
        self.mora_matrix[adapter] = nn.Parameter(mora_matrix)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_operator(self, adapter: str, spec: OperatorSpec) -> None:
        """Give an adapter its operator, the seed included."""
        self.mora_spec[adapter] = spec
        self.mora_seed[adapter] = torch.tensor(spec.seed)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` may decompose `get_delta_weight`."""
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.mora_matrix:
                spec = self.mora_spec[name]
                if not torch.compiler.is_compiling():
                    kept_tables(spec, x.device)
                mora_matrix = self.mora_matrix[name].to(x.dtype)
                dropped = self.mora_dropout[name](x)
                result = result + mora_update(spec, mora_matrix, dropped)
        return result

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Add the deltas of `adapter_names` (None: the active ones) to the weight:
        summed in fp32, or in the weight's dtype if that has more bits, and rounded
        once. With `safe_merge`, raises `UserError` for a rounded weight that is not
        finite and leaves the weight unchanged."""
        chosen = check_adapters_to_merge(self, adapter_names)
        names = [name for name in chosen if name in self.mora_matrix]
        self._add_to_weight(names, 1, safe_merge)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Subtract the merged deltas. In low precision the base weight is restored
        only up to rounding."""
        self._add_to_weight(self.merged_adapters, -1, False)
        self.merged_adapters = []

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta in fp32, in the layout of the weight: (d_out, d_in), for a `Conv1D`
        (d_in, d_out). Raises `UserError` for an adapter that the layer does not have."""
        if adapter not in self.mora_matrix:
            raise UserError(unknown("adapter", adapter, self.mora_matrix))
        mora_matrix = self.mora_matrix[adapter].detach().float()
        delta = delta_weight(self.mora_spec[adapter], mora_matrix)
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def _add_to_weight(self, names: list[str], sign: int, check: bool) -> None:
        if not names:
            return
        weight: Any = self.get_base_layer().weight
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            total = total + sign * self.get_delta_weight(name)
        total = total.to(weight.dtype)
        if check and not total.isfinite().all():
            # PEFT's words, whatever the number is
            raise UserError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken"
            )
        weight.copy_(total)


class MoraModel(BaseTuner):
    """PEFT's tuner for a model with MoRA layers, created by `get_peft_model`."""

    prefix = PREFIX
    tuner_layer_cls = MoraLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (an attribute of every tuner)
    """Empty, because the default of `target_modules` works for every architecture."""

    # peft/tuners/lora/model.py; reads the model and the config alone
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter whose delta is the weighted sum of the deltas of `adapters`: its
        matrices are the weighted sums of theirs.

        Like LoRA's, it does nothing where `adapter_name` exists. Raises `UserError` for
        adapters with other operators or seeds, whose sum is no matrix of either, for
        other trained modules, for another number of weights, and for every
        `combination_type` but linear.
        """
        if adapter_name in self.peft_config:
            return
        if combination_type != "linear":
            raise UserError(
                f"combination_type {combination_type!r} combines factors, which MoRA does not have: use 'linear'"
            )
        if len(weights) != len(adapters) or not adapters:
            raise UserError(
                f"`weights`: {len(weights)} for {len(adapters)} adapter(s); give one for each"
            )
        operators = self._operators_to_sum(adapters)
        first: Any = self.peft_config[adapters[0]]
        self.peft_config[adapter_name] = replace(
            first,
            target_modules=set(operators),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        self.inject_adapter(self.model, adapter_name)
        for name, spec in operators.items():
            layer: Any = self.model.get_submodule(name)
            layer.set_operator(adapter_name, spec)
            total = layer.mora_matrix[adapter_name].data.zero_()
            for adapter, weight in zip(adapters, weights, strict=True):
                if adapter in layer.mora_matrix:
                    total += weight * layer.mora_matrix[adapter].data.to(total.dtype)

    def _operators_to_sum(self, adapters: list[str]) -> dict[str, OperatorSpec]:
        """Name of a layer -> the operator that all of the adapters have there."""
        for adapter in adapters:
            if adapter not in self.peft_config:
                raise UserError(f"Adapter {adapter} does not exist")
        configs: list[Any] = [self.peft_config[adapter] for adapter in adapters]
        if any(config.modules_to_save for config in configs):
            raise UserError("adapters with `modules_to_save` cannot be summed")
        settings = [
            (replace(config.adapter(), dropout=0.0), config.rank_pattern)
            for config in configs
        ]
        operators: dict[str, OperatorSpec] = {}
        is_one = all(values == settings[0] for values in settings)
        for name, layer in self.model.named_modules():
            specs = getattr(layer, "mora_spec", {})
            for adapter in specs.keys() & set(adapters):
                spec = operators.setdefault(name, specs[adapter])
                is_one = is_one and spec == specs[adapter]
        if not is_one:
            raise UserError(
                f"{', '.join(adapters)} have other operators or seeds, so that the sum of their deltas is the delta of "
                "no MoRA matrix: train them with one `r`, `operator` and `seed`, or merge them one after the other"
            )
        return operators

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *arguments: Any, **kwargs: Any
    ) -> Iterator[None]:
        """PEFT enters this context around `forward` and `generate`. Rejects
        `adapter_names`, an adapter for each sequence."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names: all sequences of a batch use the same MoRA adapters, those of set_adapter"
            )
        yield

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        if isinstance(target, MoraLinear):
            target.add(adapter_name, peft_config, current_key)
            return
        is_layer = is_linear(target) and not isinstance(target, BaseTunerLayer)
        if not is_layer or not target.weight.is_floating_point():
            raise UserError(
                f"target_modules includes {current_key!r}, a {type(target).__name__}: MoRA adapts nn.Linear and Conv1D "
                "with floating-point weights"
            )
        layer = MoraLinear(target)
        layer._active_adapter = adapter_name
        layer.add(adapter_name, peft_config, current_key)
        # An additional adapter is not trained until `set_adapter` activates it.
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
