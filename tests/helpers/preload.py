"""What the fork server of `tests/helpers/gloo.py` imports once for all ranks."""

# isort: off
import tests.conftest  # noqa: F401  (environment first)
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (the engine imports it late: half of a small run's time)
import transformers.models.llama.modeling_llama  # noqa: F401
import mora_ds.train.pretrain  # noqa: F401
