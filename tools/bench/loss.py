"""What the loss in chunks of a frozen head saves: peak memory and time of a forward and backward pass.

    python tools/bench/loss.py [--vocab 32768] [--width 256] [--tokens 4096] [--dtype float32]

A Llama of two layers, whose logits are most of what it holds; each way in a process of its own, because a peak does not
come down. On a CPU the peak of the resident set over what the process held before the step; on a GPU of what was
allocated. Time: the better of two steps, in one thread of a CPU the thread's own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject
from mora_ds.models.loss import chunk_loss, token_nll
from tools.bench.measuring import llama_config
from tools.bench.report import Report, json_flag


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(options: argparse.Namespace, chunked: bool) -> tuple[float, float, float]:
    """(MiB over what was held, seconds, loss a token) of one step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    now = time.perf_counter if device.type == "cuda" else time.thread_time
    config = llama_config(options.width, 2, options.vocab, 2048, mlp=2 * options.width, heads=8)
    model: Any = LlamaForCausalLM(config)
    model.to(device, getattr(torch, options.dtype))
    inject(model, MoRAConfig(rank=8))
    if chunked:
        chunk_loss(model)
    ids = torch.randint(options.vocab, (options.tokens // 512, 513), device=device)
    positions = torch.arange(512, device=device).expand(len(ids), -1)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions}
    before, times = peak_mib(device), []
    for _ in range(2):
        started = now()
        nll = token_nll(model, batch)
        nll.backward()
        loss = nll.item() / batch["labels"].numel()
        times.append(now() - started)
    return peak_mib(device) - before, min(times), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", default="float32")
    json_flag(parser)
    options = parser.parse_args()
    report = Report(options)
    compare(options, report)
    report.write()


def compare(options: argparse.Namespace, report: Report) -> None:
    """Both ways, each in a process of its own: the table `loss`."""
    rows = [["loss", "peak over the model, MiB", "time, s", "a token"]]
    logits = options.tokens * options.vocab * 4 / 2**20
    report.say(f"{options.tokens} tokens, vocabulary {options.vocab}: logits in fp32 {logits:.0f} MiB")
    context = multiprocessing.get_context("spawn")
    for chunked in (False, True):
        with context.Pool(1) as pool:
            peak, seconds, loss = pool.apply(measure, (options, chunked))
        rows.append(["chunked" if chunked else "whole", f"{peak:.0f}", f"{seconds:.2f}", f"{loss:.6f}"])
    report.show("loss", rows)


if __name__ == "__main__":
    main()
