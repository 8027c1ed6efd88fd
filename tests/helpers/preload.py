"""What the fork server of `tests/helpers/gloo.py` loads once, so that no rank pays for it."""

# isort: off
import gc

import tests.conftest  # noqa: F401  (environment first)
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (the engine imports it late: half of a small run's time)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
import transformers.models.llama.modeling_llama  # noqa: F401
import mora_ds.train.pretrain  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions
gc.collect()
gc.freeze()  # ranks neither walk nor copy the modules' objects when they collect garbage, as DeepSpeed does often
