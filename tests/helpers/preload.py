"""What the fork server of `tests/helpers/gloo.py` loads once, so that no rank pays for it."""

# isort: off
import functools
import gc

import tests.conftest  # noqa: F401  (environment first)
import mora_ds.train.pretrain  # noqa: F401  (and DeepSpeed)
import deepspeed.module_inject.auto_ep_layer  # this and the next: what every engine imports as it is made
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
import transformers.models.llama.modeling_llama  # noqa: F401
from mora_ds.engine.muon import load_kernels
from mora_ds.train import run_file, setup

load_kernels()  # as every engine does
for module in (run_file, setup):  # every run asks for versions, and each is a file to be parsed
    module.version = functools.cache(module.version)
run_file.versions()
for name in setup.PACKAGES:
    setup.version(name)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions
gc.collect()
gc.freeze()  # ranks neither walk nor copy the modules' objects when they collect garbage, as DeepSpeed does often
