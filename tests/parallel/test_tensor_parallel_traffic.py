"""The bytes that tensor parallelism communicates: none of the base."""

from mora_ds.adapters.inject import frozen_buffers, mora_layers
from mora_ds.engine.traffic import CollectiveCounter
from tests.helpers.gloo import run_ranks
from tests.helpers.models import causal_loss, tokens
from tests.helpers.tensor_parallel import model_of, start

ROWS = 2
LENGTH = 16
PASSES = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""MoRA matrices are gathered in forward and again in backward, as at a size that
matters.
"""
SHAPE = {"num_key_value_heads": 4, "intermediate_size": 68}
"""MoRA matrices of 16 and 20 rows: no padding."""
CASES = {
    "gather": {"family": "llama", "model": SHAPE},
    "fallback": {
        "family": "llama",
        "model": {**SHAPE, "num_key_value_heads": 1, "num_attention_heads": 1},
    },
    "rotate": {"family": "llama", "operator": "rotate", "model": SHAPE},
}
DEGREE = 2
REPLICAS = 2


def counted(case):
    """Bytes of one micro-batch's forward and backward, by kind, and those of the base."""
    engine, replica, replicas = start(case, DEGREE, **PASSES)
    # Or the first layers would be spared their backward
    engine.module.enable_input_require_grads()
    counter = CollectiveCounter(frozen_buffers(engine.module).values())
    ids = tokens(ROWS * replicas, LENGTH)[replica * ROWS :][:ROWS]
    with counter.counting():
        # ZeRO-3 traces the first micro-batch; the second ends a step
        for index in range(3):
            counter.reset()
            engine.backward(causal_loss(engine, ids))
            bytes_by_kind = dict(counter.bytes)
            if index < 2:
                engine.step()
    return {"bytes": bytes_by_kind, "base": counter.base_bytes}


def all_counted():
    return {name: counted(case) for name, case in CASES.items()}


def test_no_byte_is_of_the_base():
    ranks = run_ranks(DEGREE * REPLICAS, all_counted)
    for name, case in CASES.items():
        model = model_of(case)
        matrices = 4 * sum(
            layer.adapter_weight.numel() for layer in mora_layers(model).values()
        )
        shares = matrices // DEGREE
        outputs = 4 * ROWS * LENGTH * model.config.hidden_size
        blocks = 2 * model.config.num_hidden_layers
        for counted_bytes in (rank[name] for rank in ranks):
            assert counted_bytes["base"] == 0
            gathered = counted_bytes["bytes"]["all_gather_into_tensor"]
            reduced = counted_bytes["bytes"]["reduce_scatter_tensor"]
            # Attention unsplit: its u is gathered, the gradient of its z summed; the MLP is
            # split
            if name == "fallback":
                unsplit = [
                    layer
                    for path, layer in mora_layers(model).items()
                    if "self_attn" in path
                ]
                lanes = 4 * ROWS * LENGTH * sum(layer.spec.r_hat for layer in unsplit)
                of_mlp = matrices - 4 * sum(
                    layer.adapter_weight.numel() for layer in unsplit
                )
                assert gathered == 2 * (shares + of_mlp) + lanes
                assert reduced == shares + of_mlp
                assert counted_bytes["bytes"]["all_reduce"] == blocks * outputs + lanes
            else:
                assert gathered == 2 * (shares + matrices), (
                    "by ZeRO and by the group, in forward and in backward"
                )
                assert reduced == shares + matrices
                assert counted_bytes["bytes"]["all_reduce"] == 2 * blocks * outputs
