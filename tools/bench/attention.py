"""Attention by documents next to dense attention with a mask: time of one layer, forward and backward, and peak memory.

    python tools/bench/attention.py [--rows 1] [--seq_len 2048] [--heads 16] [--shared 4] [--head_size 64]

Rows of one document, of a few, and of many short ones, whose lengths are drawn from an exponential distribution with
the mean in the table. Dense is transformers' sdpa with the boolean mask that it makes for such rows. The two alternate,
so that a shared machine slows both; the ratio is the median over pairs. On a CPU the time is that of one thread, its
own. Outputs are compared too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.data.documents import Documents
from mora_ds.models.document_attention import document_attention
from mora_ds.planning.memory_meter import MemoryMeter
from tools.bench.measuring import llama_config
from tools.bench.report import Report, json_flag


def positions_of(rows: int, length: int, mean: int) -> Tensor:
    """(rows, length) positions that restart at documents of `mean` tokens; 0 for one document a row."""
    positions = torch.arange(length).expand(rows, -1).clone()
    if mean:
        generator = torch.Generator().manual_seed(mean)
        begins = torch.rand(rows, length, generator=generator) < 1 / mean
        begins[:, 0] = True
        positions -= torch.cummax(torch.where(begins, positions, 0), dim=1)[0]
    return positions


class Case:
    """One layer's attention, in both ways."""

    def __init__(self, options: argparse.Namespace, mean: int, window: int | None) -> None:
        self.window, self.device = window, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, options.dtype)
        self.positions = positions_of(options.rows, options.seq_len, mean)
        self.documents = Documents.of(self.positions).to(self.device)
        heads = (options.heads, options.shared, options.shared)
        self.parts = [
            torch.randn(options.rows, count, options.seq_len, options.head_size, dtype=dtype, device=self.device)
            for count in heads
        ]
        for part in self.parts:
            part.requires_grad_()
        self.module = nn.Module()
        self.module.num_key_value_groups = options.heads // options.shared
        config: Any = llama_config(64, 1, 128, options.seq_len, mlp=64, heads=2)
        config._attn_implementation, config.sliding_window = "sdpa", window
        embeds = torch.empty(options.rows, options.seq_len, 1, device=self.device)
        make = create_causal_mask if window is None else create_sliding_window_causal_mask
        self.mask = make(config, embeds, None, None, position_ids=self.positions.to(self.device))

    def step(self, by_documents: bool) -> Tensor:
        """The output, after a backward pass."""
        query, key, value = self.parts
        for part in self.parts:
            part.grad = None
        if by_documents:
            out, _ = document_attention(
                self.module, query, key, value, None, sliding_window=self.window, documents=self.documents
            )
        else:
            out, _ = sdpa_attention_forward(self.module, query, key, value, self.mask)
        out.sum().backward()
        return out.detach()

    def seconds(self, by_documents: bool) -> float:
        is_cuda = self.device.type == "cuda"
        now = time.perf_counter if is_cuda else time.thread_time
        started = now()
        self.step(by_documents)
        if is_cuda:
            torch.cuda.synchronize()
        return now() - started

    def peak_mib(self, by_documents: bool) -> float:
        with MemoryMeter(self.parts) as meter:
            self.step(by_documents)
        mask = 0 if by_documents or self.mask is None else self.mask.untyped_storage().nbytes()
        return (meter.peak + mask) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--shared", type=int, default=4, help="key-value heads")
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--window", type=int, default=256, help="of the cases with a sliding window")
    parser.add_argument("--means", type=int, nargs="+", default=[0, 700, 150, 40], help="0: one document a row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    json_flag(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(options)
    titles = ["mean length", "documents", "window", "dense, ms", "by documents, ms", "ratio"]
    rows = [[*titles, "dense, MiB", "by documents, MiB", "difference"]]
    for window in (None, options.window):
        for mean in options.means:
            case = Case(options, mean, window)
            error = float((case.step(True) - case.step(False)).abs().max())
            pairs = [(case.seconds(False), case.seconds(True)) for _ in range(options.repeats)]
            dense, ours = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
            ratio = statistics.median(by_documents / masked for masked, by_documents in pairs)
            peaks = [f"{case.peak_mib(way):.1f}" for way in (False, True)]
            count = len(case.documents.lengths)
            rows.append(
                [str(mean or options.seq_len), str(count), str(window or ""), f"{dense:.1f}", f"{ours:.1f}",
                 f"{ratio:.2f}", *peaks, f"{error:.0e}"]
            )  # fmt: skip
    report.show("attention", rows)
    report.write()


if __name__ == "__main__":
    main()
