"""mora_ds: MoRA and ReMoRA for DeepSpeed. The names in `__all__` are the public API:

    inject(model, MoRAConfig(rank=8))            every target layer gets a MoRA matrix, the base becomes buffers
    engine, ... = initialize(model=model, config=config_path("zero3"))      in place of deepspeed.initialize
    run = Run(engine, base=..., folder="out"); run.merge(step); run.save(step)
    export_merged(checkpoint, output)                            a merged Hugging Face model
    export_adapter(checkpoint, folder); load_adapter(base, folder)      the adapter alone, and its use on a base
    combine_adapters([a, b], [0.5, 0.5], folder)                 a weighted sum of updates of one base

They are imported at first use, so that `import mora_ds` is fast.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mora_ds.common.version import __version__

logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from mora_ds.adapters.config import MoRAConfig
    from mora_ds.adapters.domains import domains_of
    from mora_ds.adapters.inject import InjectionReport, inject, mora_layers
    from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight, mora_update
    from mora_ds.adapters.ops.spec import OperatorKind
    from mora_ds.common.errors import RunError, UserError
    from mora_ds.common.files import config_path
    from mora_ds.deploy.adapter_io import export_adapter, load_adapter
    from mora_ds.deploy.combine import combine_adapters
    from mora_ds.deploy.export import export_merged
    from mora_ds.engine.initialize import initialize
    from mora_ds.remora.ledger import Ledger
    from mora_ds.remora.merge import ReMoRA
    from mora_ds.train.run import Run

_HOME = {
    "MoRAConfig": "adapters.config",
    "domains_of": "adapters.domains",
    "initialize": "engine.initialize",
    "RunError": "common.errors",
    "UserError": "common.errors",
    "combine_adapters": "deploy.combine",
    "config_path": "common.files",
    "export_adapter": "deploy.adapter_io",
    "export_merged": "deploy.export",
    "InjectionReport": "adapters.inject",
    "inject": "adapters.inject",
    "mora_layers": "adapters.inject",
    "Ledger": "remora.ledger",
    "load_adapter": "deploy.adapter_io",
    "OperatorKind": "adapters.ops.spec",
    "OperatorSpec": "adapters.ops.mora",
    "delta_weight": "adapters.ops.mora",
    "mora_update": "adapters.ops.mora",
    "ReMoRA": "remora.merge",
    "Run": "train.run",
}

__all__ = [
    "InjectionReport",
    "Ledger",
    "MoRAConfig",
    "OperatorKind",
    "OperatorSpec",
    "ReMoRA",
    "Run",
    "RunError",
    "UserError",
    "__version__",
    "combine_adapters",
    "config_path",
    "delta_weight",
    "domains_of",
    "export_adapter",
    "export_merged",
    "initialize",
    "inject",
    "load_adapter",
    "mora_layers",
    "mora_update",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mora_ds' has no attribute {name!r}")
    return getattr(import_module(f"mora_ds.{_HOME[name]}"), name)
