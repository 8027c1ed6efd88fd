"""ZeRO-3 on a device with streams, with stand-ins for them on the CPU: the host waits for
nothing in a micro-batch.
"""

from contextlib import nullcontext

import pytest
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mora_ds.engine.initialize import initialize
from mora_ds.engine.zero import Stage3View
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.models import adapted_model, causal_loss, tokens

CALLS = []


class Stream:
    """A stream, or an event on one."""

    def __init__(self, *_, name="reductions", **__):
        self.name = name

    def synchronize(self):
        CALLS.append(f"the host waits for {self.name}")

    def wait_stream(self, stream):
        CALLS.append(f"{self.name} wait for {stream.name}")

    def record(self):
        pass

    def query(self):
        return True


def arithmetic(*_):
    return Stream(name="arithmetic")


STREAMS = {
    **dict.fromkeys(
        ("is_synchronized_device", "resolves_data_dependency"), lambda self: False
    ),
    "handles_memory_backpressure": lambda self: False,
    **dict.fromkeys(("Stream", "Event"), Stream),
    **dict.fromkeys(("current_stream", "default_stream"), arithmetic),
    "stream": lambda self, stream: nullcontext(),
}
"""The methods for streams that DeepSpeed calls on an accelerator."""


def micro_batches(streams, repaired, zero_settings):
    """The calls of each micro-batch, two a step, and M of every layer after them."""
    if streams:
        for name, answer in STREAMS.items():
            setattr(type(get_accelerator()), name, answer)
        Tensor.record_stream = lambda tensor, stream: None
    if not repaired:
        Stage3View._order_reductions = lambda view: None
    model = adapted_model()
    config = ds_config(3, 2, 2)
    config["zero_optimization"].update(zero_settings)
    engine, *_ = initialize(model=model, config=config)
    calls = []
    for number in range(4):
        CALLS.clear()
        engine.backward(causal_loss(engine, tokens(2, seed=number)))
        calls.append(list(CALLS))
        engine.step()
    return calls, [flat.master.detach().clone() for flat in Stage3View(engine).flats()]


@pytest.mark.parametrize("overlap", [True, False])
def test_arithmetic_waits_for_reductions_and_the_host_does_not(overlap):
    settings = {"overlap_comm": overlap}
    stream = "reductions" if overlap else "arithmetic"
    for unrepaired, _ in run_ranks(2, micro_batches, True, False, settings):
        # DeepSpeed's own: where this fails, an upgrade has changed what the repair is for.
        assert all(f"the host waits for {stream}" in calls for calls in unrepaired)
    results = run_ranks(2, micro_batches, True, True, settings)
    without_streams = run_ranks(2, micro_batches, False, True, settings)
    for (repaired, matrices), (_, expected) in zip(
        results, without_streams, strict=True
    ):
        assert not [call for calls in repaired for call in calls if "host" in call]
        assert all(calls[-1] == f"arithmetic wait for {stream}" for calls in repaired)
        for matrix, wanted in zip(matrices, expected, strict=True):
            assert matrix.equal(wanted)
