"""What `mora_ds/engine` relies on in DeepSpeed where no run on a CPU would tell that it has
moved.

When an upgrade breaks a test here, the message names the symbol: adapt mora_ds/engine, then
this file.
"""

import inspect
from importlib import import_module
from importlib.metadata import version


def test_the_version_is_one_that_was_tried():
    assert version("deepspeed").startswith("0.19."), (
        "setup.cfg pins the minor version: try the new one here first"
    )


def test_the_switch_that_avoids_a_build_is_read():
    source = inspect.getsource(import_module("deepspeed.comm.torch").build_shm_op)
    assert "__compatible_ops__.get(builder.NAME" in source, (
        "build_shm_op asks something else now"
    )
    builder = import_module("deepspeed.ops.op_builder.cpu.comm").ShareMemCommBuilder
    assert builder.NAME == "deepspeed_shm_comm", (
        "the switch in zero.prepare_backend has another name now"
    )
