"""What the settings of a run say about the engine. Imports neither torch nor
DeepSpeed."""

from dataclasses import dataclass
from enum import Enum


class BaseDevice(str, Enum):
    """Where the frozen weights of the decoder layers are."""

    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"


class OptimizerKind(str, Enum):
    """The optimizer of the MoRA matrices; other parameters always have AdamW."""

    ADAMW = "adamw"
    MUON = "muon"


@dataclass(frozen=True)
class EngineSettings:
    """The flags for values that a DeepSpeed config has as well."""

    micro_batch_size: int
    """Sequences per process and micro-batch."""
    gradient_accumulation_steps: int
    learning_rate: float
    """Peak learning rate of the adapter, or of everything in full training."""
    other_learning_rate: float
    """Peak learning rate of the other trained parameters."""
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    bf16: bool
    fp16: bool
    optimizer: OptimizerKind = OptimizerKind.ADAMW
