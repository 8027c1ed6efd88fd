"""What tensor parallelism puts on the wire, counted, against what `costs` says; and the design's table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.parallel.saved_inputs import TPInputs
from mora_ds.planning.costs import Collective, cost_table, costs
from tests.helpers.gloo import run_ranks
from tests.helpers.models import causal_loss, tokens
from tests.helpers.tensor_parallel import Case, model_of, start

ROWS, LENGTH = 2, 16
PASSES = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""MoRA matrices are gathered in forward and again in backward, as at a size that matters."""
SHAPE = {"num_key_value_heads": 4, "intermediate_size": 68}
"""MoRA matrices of 16 and 20 rows: no padding."""
CASES: dict[str, Case] = {
    "gather": {"family": "llama", "model": SHAPE},
    "aligned": {"family": "llama", "segments": 4, "model": SHAPE},
    "fallback": {"family": "llama", "model": {**SHAPE, "num_key_value_heads": 1, "num_attention_heads": 1}},
    "rotate": {"family": "llama", "operator": "rotate", "model": SHAPE},
    "folded inputs": {"family": "llama", "rank": 1, "model": SHAPE},  # 8 and 10 rows: 24 and 20 columns of 32 in all
    "whole inputs": {"family": "llama", "model": SHAPE, "inputs": "whole"},
}
DEGREE, REPLICAS = 2, 2


def counted(case: Case) -> dict[str, Any]:
    """Bytes of one micro-batch's forward and backward, by kind, and those of the base."""
    engine, replica, replicas = start(case, DEGREE, **PASSES)
    engine.module.enable_input_require_grads()  # or the first layers would be spared their backward
    counter = CollectiveCounter(frozen_buffers(engine.module).values())
    ids = tokens(ROWS * replicas, LENGTH)[replica * ROWS :][:ROWS]
    with counter.counting():
        for index in range(3):  # ZeRO-3 traces the first micro-batch; the second ends a step
            counter.reset()
            engine.backward(causal_loss(engine, ids))
            found = dict(counter.bytes)
            if index < 2:
                engine.step()
    return {"bytes": found, "base": counter.base_bytes}


def all_counted() -> dict[Any, Any]:
    return {name: counted(case) for name, case in CASES.items()}


KINDS = {
    Collective.GATHER: "all_gather_into_tensor",
    Collective.SCATTER: "reduce_scatter_tensor",
    Collective.SUM: "all_reduce",
}


@pytest.mark.gloo
def test_the_bytes_are_those_predicted_and_none_is_of_the_base() -> None:
    ranks = run_ranks(DEGREE * REPLICAS, all_counted)
    for name, case in CASES.items():
        inputs = TPInputs(case.get("inputs", "auto"))
        cost = costs(model_of(case), DEGREE, REPLICAS, ROWS * LENGTH, inputs=inputs)
        expected = {KINDS[kind]: 4 * cost.payload(kind) for kind in Collective if cost.payload(kind)}
        for found in (rank[name] for rank in ranks):
            assert found["base"] == 0
            assert found["bytes"] == expected, name


def test_an_aligned_grouping_adds_nothing_for_the_squares() -> None:
    """Only ZeRO's own gathers of the shares are left, half of what one replica's would be at t = 1."""
    aligned, gather = (costs(model_of(CASES[name]), 2, 2, 32) for name in ("aligned", "gather"))
    assert {item.ranks for item in aligned.traffic if item.what == "square"} == {2}
    alone = costs(model_of(CASES["gather"]), 1, 2, 32)
    assert aligned.wire("square") == alone.wire("square") / 2 < gather.wire("square")
    assert aligned.wire("activation") == gather.wire("activation")


# -- the design's table -----------------------------------------------------------------------------------------------


def seven_billion(**config: Any) -> torch.nn.Module:
    """One layer of Llama 7B, on the meta device, with an adapter of rank 256 whose sides are the paper's."""
    llama = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=1, vocab_size=64
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama)
    inject(model, MoRAConfig(rank=256, r_hat_multiple=1, **config))
    return model


def test_the_table_for_8_ranks_of_4096_tokens() -> None:
    """Tera-MACs, and millions of elements, a layer and rank: the design's table, line by line."""
    rows = cost_table(seven_billion(), seven_billion(segments=8), 8, (2, 8), 4096)
    found = {row.name: (round(row.macs / 1e12, 2), round(row.wire / 1e6)) for row in rows}
    assert found == {
        "data parallel only, base unsharded": (1.90, 52),
        "every rank repeats the base, t = 2": (3.56, 166),
        "split, M gathered, t = 2": (2.15, 187),
        "split, M aligned, t = 2": (1.90, 157),
        "every rank repeats the base, t = 8": (13.51, 1006),
        "split, M gathered, t = 8": (2.99, 992),
        "split, M aligned, t = 8": (1.90, 940),
        "ZeRO-3 with the base sharded too": (1.90, 407),
        "sequence parallel (Ulysses), s = 2": (1.90, 120),
        "sequence parallel (Ulysses), s = 8": (1.90, 170),
        # and what the default adds to it: a gather of 4096 + 2 x 1966 elements a token
        "split, M gathered, inputs split, t = 2": (2.15, 220),
        "split, M aligned, inputs split, t = 2": (1.90, 190),
        "split, M gathered, inputs split, t = 8": (2.99, 1222),
        "split, M aligned, inputs split, t = 8": (1.90, 1170),
    }


def test_the_tool_prints_it(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "num_hidden_layers": 32, "vocab_size": 64,
    }))  # fmt: skip
    tool = Path(__file__).resolve().parents[2] / "tools" / "tp_cost.py"
    text = subprocess.run([sys.executable, str(tool), str(config)], capture_output=True, text=True, check=True).stdout
    assert "split, M aligned, t = 8                            1.90         940" in text
    assert "r_hat 1440, 1952" in text
