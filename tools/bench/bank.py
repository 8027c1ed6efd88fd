"""Many adapters over one base: what they weigh in memory, and a mixed batch against as many passes with merging.

    python tools/bench/bank.py [--adapters 310] [--width 256] [--layers 2] [--operator rotate] [--rank 8] [--cycles 1]
        [--rows 16] [--tokens 1 16 64 256] [--repeat 9] [--folder DIR]

A Llama of random weights and random adapters, written as portable adapters by the project's own writers.

memory   every adapter is evaluated on one row of tokens, all in one process that keeps them all: by how much its
         tensors and its memory (RssAnon) grow, over the bytes of the MoRA matrices in the files
time     a batch whose rows have an adapter each, choosing them included (they are in memory), against the same rows
         one by one with the adapter merged first (weights formed from the original and written, matrices in memory),
         and against the bank with one row at a time. In fp32, one thread's own time, medians of interleaved turns
equal    largest difference of a logit to the merged model's, over all adapters in mixed batches
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.adapters.config import MoRAConfig
from mora_ds.checkpoint.adapter_files import AdapterTensors, read_adapter
from mora_ds.checkpoint.layout import LEDGER_FOLDER
from mora_ds.common.errors import UserError
from mora_ds.deploy.bank import AdapterBank
from mora_ds.deploy.bank_layer import BankLinear
from mora_ds.remora.ledger import Ledger
from mora_ds.runtime import cli
from tests.helpers.adapters import Maker, Updates, merge, originals
from tools.bench.measuring import llama_config, memory_of
from tools.bench.report import Report, json_flag

VOCABULARY = 1024


Found = tuple[str, list[list[str]]]
"""A sentence, and the rows of a table or none."""


def main() -> None:
    options = _options()
    if min(options.adapters, options.rows, options.repeat, *options.tokens) < 1 or options.cycles < 0:
        raise UserError("--adapters, --rows, --repeat and --tokens must be at least 1, --cycles at least 0")
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        started = time.monotonic()
        own = write(Path(folder), options)
        report = Report(options)
        report.say(
            f"{options.adapters} adapters of {own / options.adapters / 2**20:.2f} MiB of matrices ({options.operator},"
            f" rank {options.rank}, {options.cycles} merged cycle(s)) in {time.monotonic() - started:.0f} s"
        )
        for measure in (memory, speed, equality):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                sentence, rows = pool.apply(measure, (Path(folder), options, own))
            report.say(sentence)
            if rows:
                report.show("speed", rows)
        report.write()


def write(folder: Path, options: argparse.Namespace) -> int:
    """The base and the adapters; bytes of all MoRA matrices."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = llama_config(options.width, options.layers, VOCABULARY, 1024, heads=8, kv_heads=4)
    maker, own = Maker(LlamaForCausalLM(config), folder / "base"), 0
    for index in range(options.adapters):
        adapter = MoRAConfig(rank=options.rank, operator=options.operator, seed=index)
        updates = maker.write(folder / "bank" / f"adapter-{index:04d}", adapter, options.cycles)
        own += sum(square.nbytes for cycles in updates.values() for _, square in cycles)
    return own


def memory(folder: Path, options: argparse.Namespace, own: int) -> Found:
    torch.set_num_threads(1)
    bank, ids = AdapterBank.open(folder / "base", folder / "bank"), _ids(options.rows, max(options.tokens))
    _logits(bank.model, ids)
    _logits(bank.model, ids[:1])  # what a forward takes is not the adapters'
    before, started = _anonymous(), time.monotonic()
    for name in bank.names:
        with bank.use(name):
            _logits(bank.model, ids[:1])
    seconds, after = time.monotonic() - started, _anonymous()
    with bank.use(bank.names[: options.rows]):
        layers = [module for module in bank.model.modules() if isinstance(module, BankLinear)]
        batch = sum(layer.terms.nbytes for layer in layers if layer.terms is not None)
    return (
        f"memory: {len(bank.cache.names)} adapters evaluated and held, {own / 2**20:.1f} MiB of MoRA matrices;"
        f" {seconds:.1f} s, reading and checking included;"
        f" tensors held {bank.cache.nbytes / own:.3f} of it, growth of the process {(after - before) / own:.3f},"
        f" what a mixed batch of {options.rows} adds {batch / own:.3f}",
        [],
    )


def speed(folder: Path, options: argparse.Namespace, own: int) -> Found:
    torch.set_num_threads(1)
    bank, model = AdapterBank.open(folder / "base", folder / "bank"), _merging(folder)
    names = [bank.names[row % len(bank.names)] for row in range(options.rows)]
    weights, updates = originals(model), {name: read_updates(folder / "bank" / name) for name in set(names)}
    rows = [["tokens a row", "mixed, ms", "merging / mixed", "one by one / mixed", "base alone / mixed"]]
    for tokens in options.tokens:
        ids = _ids(options.rows, tokens)

        def mixed(ids: Tensor = ids) -> None:
            with bank.use(names):
                _logits(bank.model, ids)

        def merging(ids: Tensor = ids) -> None:
            for row, name in enumerate(names):
                merge(model, weights, updates[name])
                _logits(model, ids[row : row + 1])

        def one_by_one(ids: Tensor = ids) -> None:
            for row, name in enumerate(names):
                with bank.use(name):
                    _logits(bank.model, ids[row : row + 1])

        def base(ids: Tensor = ids) -> None:
            _logits(bank.model, ids)

        first, *others = _medians([mixed, merging, one_by_one, base], options.repeat)
        rows.append([str(tokens), f"{1e3 * first:.1f}", *(f"{other / first:.2f}" for other in others)])
    return f"time of a batch of {options.rows} rows, an adapter each, against mixed:", rows


def equality(folder: Path, options: argparse.Namespace, own: int) -> Found:
    torch.set_num_threads(1)
    bank = AdapterBank.open(folder / "base", folder / "bank", cache_adapters=options.rows)
    model, worst, largest = _merging(folder), 0.0, 0.0
    weights, ids = originals(model), _ids(options.rows, min(options.tokens))
    for start in range(0, len(bank.names), options.rows):
        names = bank.names[start : start + options.rows]
        with bank.use(names):
            found = _logits(bank.model, ids[: len(names)])
        for row, name in enumerate(names):
            merge(model, weights, read_updates(folder / "bank" / name))
            expected = _logits(model, ids[row : row + 1])
            worst = max(worst, (expected - found[row]).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    return f"equal: to merged models within {worst:.1e} (logits up to {largest:.2f}), {len(bank.names)} adapters", []


def read_updates(folder: Path) -> Updates:
    """The MoRA matrices of every cycle of a portable adapter."""
    adapter = read_adapter(folder)
    ledger, tensors = Ledger.open(folder / LEDGER_FOLDER, hashes=False), AdapterTensors.open(folder, adapter)
    return {
        name: [*ledger.squares_of(name), (entry.operator, tensors.square(name))]
        for name, entry in adapter.layers.items()
    }


def _merging(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()


@torch.inference_mode()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


def _anonymous() -> int:
    gc.collect()
    return memory_of("RssAnon")


def _medians(steps: list[Callable[[], None]], repeat: int) -> list[float]:
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(repeat + 1):
        for each, step in zip(times, steps, strict=True):
            started = time.thread_time()
            step()
            if turn:
                each.append(time.thread_time() - started)
    return [statistics.median(each) for each in times]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=310)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--operator", default="rotate")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=1, help="merged cycles of every adapter")
    parser.add_argument("--rows", type=int, default=16, help="of a mixed batch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256], help="of a row")
    parser.add_argument("--repeat", type=int, default=9)
    json_flag(parser)
    parser.add_argument("--folder", type=Path, help="where the adapters are written, and removed again")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
