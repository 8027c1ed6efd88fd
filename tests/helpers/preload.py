"""Modules that the fork server of `tests/helpers/gloo.py` loads once for all ranks."""

# isort: off
import functools
import gc

import tests.conftest
import mora_ds.train.pretrain  # noqa: F401  (and DeepSpeed)
import tests.helpers.stores  # noqa: F401  (the ranks' storage)

# This and the next: what every engine imports as it is made
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
import transformers.models.llama.modeling_llama  # noqa: F401
from mora_ds.engine.muon import load_kernels
from mora_ds.common import object_store
from mora_ds.train import run_file, setup

# Runs that are started again need not wait long
object_store.RENEWED_S = 0.4
object_store.EXPIRES_S = 2.0
load_kernels()  # as every engine does
# Every run asks for versions, and each is a file to be parsed
for module in (run_file, setup):
    module.version = functools.cache(module.version)
run_file.versions()
for name in setup.PACKAGES:
    setup.version(name)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions
gc.collect()
# Ranks neither walk nor copy the modules' objects when they collect garbage, as DeepSpeed
# does often
gc.freeze()
