"""`MoraConfig`: the PEFT config of a MoRA adapter, saved as adapter_config.json."""

from dataclasses import dataclass, field, replace

from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.ops.spec import R_HAT_MULTIPLE
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import Count, typed
from mora_ds.peft.register import PEFT_TYPE

_FORMAT = 2
"""From 2 on the weights have the seeds of the permutations."""

_TYPES = {
    "r": int,
    "rank_pattern": dict[str, int],
    "r_hat_multiple": int,
    "operator": str,
    "grouping": str,
    "mora_dropout": float,
    "seed": int,
    "cycle": Count,
    "init_weights": bool,
}
"""Types of the settings that determine a layer's matrix. PEFT does not check the values
in adapter_config.json."""


@dataclass
class MoraConfig(PeftConfig):
    """`mora_ds.MoRAConfig` with PEFT's names and selection of modules. Raises
    `UserError` for invalid values."""

    r: int = 8
    """Rank of a LoRA with the same number of parameters as the MoRA matrix."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Name or regular expression of modules -> their rank in place of `r`."""
    r_hat_multiple: int = R_HAT_MULTIPLE
    """The side of a MoRA matrix is a multiple of this."""
    operator: str = "auto"
    """truncate, share, decouple, rotate, or auto."""
    grouping: str = "permuted"
    """permuted, plain, or a fixed grouping of share."""
    mora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    seed: int = 42
    """Seed of the permutations, hashed with the layer's name."""
    cycle: int = 0
    """Number of previous merges. Each cycle has different permutations."""
    target_modules: list[str] | str | None = "all-linear"
    """Names or a regular expression of modules, or all-linear."""
    exclude_modules: list[str] | str | None = None
    """Modules to exclude."""
    layers_to_transform: list[int] | int | None = None
    """Indices of layers."""
    layers_pattern: list[str] | str | None = None
    """Name of the list of layers."""
    modules_to_save: list[str] | None = None
    """Modules that are trained in full and saved."""
    ensure_weight_tying: bool = False
    """Whether tied weights stay tied where `modules_to_save` has one of them."""
    init_weights: bool = True
    """Whether M starts at zero. False: small random numbers, for tests."""

    mora_format: int | None = None
    """Format of adapter_config.json and of the weights next to it; set by the
    config."""

    def __post_init__(self) -> None:
        # Only a saved config gives its type
        is_saved = self.peft_type is not None
        if is_saved and self.mora_format != _FORMAT:
            raise UserError(
                "adapter_config.json: mora_ds 0.3 saved this adapter, without the seeds of its permutations; merge "
                "it with that version, or train it again"
            )
        self.mora_format = _FORMAT
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's own configs do
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"`{name}` has no effect when `target_modules` is a str: give a list of names"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                "`layers_pattern` needs `layers_to_transform`: give the numbers of layers"
            )
        for name, hint in _TYPES.items():
            typed(hint, getattr(self, name), name)
        settings = self.adapter()
        for rank in {*self.rank_pattern.values()}:
            replace(settings, rank=rank)

    def adapter(self, module: str = "") -> MoRAConfig:
        """The same settings as a `MoRAConfig` of mora_ds, with the rank of a module."""
        pattern = get_pattern_key(list(self.rank_pattern), module)
        return MoRAConfig(
            rank=self.rank_pattern.get(pattern, self.r),
            r_hat_multiple=self.r_hat_multiple,
            operator=self.operator,
            grouping=self.grouping,
            dropout=self.mora_dropout,
            seed=self.seed,
        )
