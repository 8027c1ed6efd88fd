"""What one rank keeps and multiplies when rows are split over s ranks (--sequence_parallel_size), against s = 1.

    python tools/bench/sequence.py [--sizes 2 4] [--seq_len 512] [--rows 2] [--hidden 256] [--heads 8] [--kv_heads 4]

Starts s ranks over gloo for each s. A Llama of random weights with MoRA matrices runs forward and backward of one
micro-batch; counted on rank 0: bytes of the tensors that autograd saves (each storage once, without weights and
squares) and floating-point operations of matrix products and attention, forward and backward.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, inject
from mora_ds.models.loss import chunk_loss, token_nll
from mora_ds.parallel.ulysses import share_rows
from mora_ds.runtime import cli
from tools.bench.measuring import SavedActivations, llama_config, on_processes
from tools.bench.report import Report, json_flag


def _attention(query_shape: Any, key_shape: Any, *others: Any, **kwargs: Any) -> int:
    """Scores and their product with the values, as torch counts its other kernels: without regard to causality."""
    return 4 * math.prod(query_shape) * int(key_shape[-2])


def _attention_backward(gradient_shape: Any, query_shape: Any, key_shape: Any, *others: Any, **kwargs: Any) -> int:
    """Scores once more, and four products."""
    return 10 * math.prod(query_shape) * int(key_shape[-2])


ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's counter does not know."""


def main() -> None:
    options = _options()
    report = Report(options)
    report.say(
        f"Llama, {options.layers} layers, width {options.hidden} (MLP {4 * options.hidden}), {options.heads} heads, "
        f"{options.kv_heads} key-value heads, vocabulary {options.vocabulary}; {options.rows} rows of "
        f"{options.seq_len} tokens a micro-batch; share, rank {options.rank}; fp32"
        f"{', gradient checkpointing' if options.gradient_checkpointing else ''}"
    )
    lines, alone = [["s", "saved MiB a rank", "ratio", "GFLOP a rank", "ratio"]], None
    for size in (1, *options.sizes):
        saved, flops = on_processes(size, _count, size, options)[0]
        alone = alone or (saved, flops)
        ratios = f"{saved / alone[0]:.3f}", f"{flops / alone[1]:.3f}"
        lines.append([str(size), f"{saved / 2**20:.2f}", ratios[0], f"{flops / 1e9:.2f}", ratios[1]])
    report.show("sequence", lines)
    report.write()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8, help="as --mora_rank")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    json_flag(parser)
    return parser.parse_args()


def _count(size: int, options: argparse.Namespace) -> tuple[int, int]:
    """(bytes that autograd saves, floating-point operations) of this process, one of `size`."""
    model = _model(options)
    sequence = share_rows(model, size)
    drawn = torch.randint(options.vocabulary, (options.rows, options.seq_len + 1))
    positions = torch.arange(options.seq_len).expand(options.rows, -1)
    batch = {"input_ids": drawn[:, :-1], "labels": drawn[:, 1:], "position_ids": positions}
    if sequence is not None:
        batch = sequence.split(batch)
    activations = SavedActivations([*model.parameters(), *model.buffers()])
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as flops:
        with activations.counting():
            loss = token_nll(model, batch)
        loss.backward()
    return activations.nbytes, flops.get_total_flops()


def _model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = llama_config(
        options.hidden, options.layers, options.vocabulary, options.seq_len, 4 * options.hidden, options.heads,
        options.kv_heads,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inject(model, MoRAConfig(rank=options.rank, operator="share", compute="activation"))
    chunk_loss(model)
    return model.train()


if __name__ == "__main__":
    cli.run(main)
