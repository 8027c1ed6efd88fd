"""A complete training step of this project and of its alternatives: tokens per second and
bytes gathered, in one launch.

    deepspeed --num_gpus 2 tools/bench/step.py [--width 512 --layers 8 --rank 8 --rows 2
    --seq_len 512 --repeat 7]

A Llama of random weights on random tokens, in turns:

    base alone        the frozen model, forward and the gradient of its input: the limit of
                      any adapter
    mora_ds           MoRA under ZeRO-3, the base unsharded on every rank; also with the
                      operator share, and our LoRA
    PEFT LoRA         of the same rank, under DeepSpeed's ZeRO-3 with its defaults: the base
                      sharded too; and under ZeRO-2, where every rank has the complete base
                      as here: the rival; and under torch's DDP, as most people run it
    fused LoRA        of the same rank, under DDP, its products added up in place
                      (`addmm_`), as Unsloth has them
    full training     under ZeRO-3

The first two compute attention and loss as the training program does, the others as
transformers does. Each takes its step in turn with the others, all ranks together; a
ratio is the median over the turns. It needs PEFT (`pip install -e '.[bench]'`).
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from mora_ds import MoRAConfig, initialize, inject
from mora_ds.adapters.config import AdapterConfig, LoRAConfig
from mora_ds.data.documents import Documents
from mora_ds.engine.initialize import initialize_full, start_distributed
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.attention import prefer_document_attention
from mora_ds.models.loss import chunk_loss, token_nll
from mora_ds.runtime import cli
from tools.bench.fused_lora import FusedLoRA
from tools.bench.measuring import (
    adamw_step,
    count_trained,
    llama_config,
    zero3_config,
)
from tools.bench.report import Report, bench_parser

VOCABULARY = 8192
BASELINES = ("base alone", "PEFT LoRA, ZeRO-3", "PEFT LoRA, ZeRO-2")
"""The baseline of the comparison."""

Step = Callable[[], None]
Contender = tuple[int, Step]
"""Trained parameters, and its step."""


def main() -> None:
    options = _options()
    start_distributed()
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(VOCABULARY, (options.rows, options.seq_len))
    contenders = _contenders(options, ids)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gathered = {}
    for name, (_, step) in contenders.items():
        step()
        with CollectiveCounter().counting() as counter:
            step()
        gathered[name] = counter.gathered_bytes
    for _ in range(options.repeat):
        for name, (_, step) in contenders.items():
            times[name].append(_seconds_together(step))
    if dist.get_rank() > 0:
        return
    report = Report(options)
    ranks = dist.get_world_size()
    report.say(
        f"Llama, {options.layers} layers of {options.width}, {options.rows} x {options.seq_len} tokens a rank, rank "
        f"{options.rank}, fp32, {ranks} ranks with {torch.get_num_threads()} thread(s) each"
    )
    against = (f"x {name}" for name in BASELINES)
    lines = [["", "trained", "tokens/s", *against, "gathered a step, rank"]]
    for name, (trained, _) in contenders.items():
        rate = ids.numel() * ranks / median(times[name])
        ratios = (_speedup(times[name], times[baseline]) for baseline in BASELINES)
        sent = f"{gathered[name] / 1e6:.2f} MB"
        lines.append([name, f"{trained:,}", f"{rate:,.0f}", *ratios, sent])
    report.show("step", lines)
    report.write()


def _options() -> argparse.Namespace:
    defaults = {
        "width": (512, "of the model"),
        "layers": (8, "how many"),
        "rank": (8, "of LoRA; MoRA matrices have about as many parameters"),
        "rows": (2, "sequences a rank and step"),
        "seq_len": (512, "tokens of each"),
        "repeat": (7, "turns"),
        "local_rank": (0, "set by the launcher"),
    }
    return bench_parser(__doc__, defaults).parse_args()


# -- contenders ------------------------------------------------------------------------


def _contenders(options: argparse.Namespace, ids: Tensor) -> dict[str, Contender]:
    config = zero3_config(options.rows)
    zero2 = {**config, "zero_optimization": {"stage": 2}}
    return {
        "base alone": (0, _frozen_step(_model(options), ids)),
        "mora_ds": _ours(options, MoRAConfig(rank=options.rank), ids),
        "mora_ds, share": _ours(
            options, MoRAConfig(options.rank, operator="share"), ids
        ),
        "mora_ds, LoRA": _ours(options, LoRAConfig(rank=options.rank), ids),
        "PEFT LoRA, ZeRO-3": _under_zero(_peft(options), config, ids),
        "PEFT LoRA, ZeRO-2": _under_zero(_peft(options), zero2, ids),
        "PEFT LoRA, DDP": _under_ddp(_peft(options), ids),
        "fused LoRA, DDP": _under_ddp(_fused(_model(options), options.rank), ids),
        "full training": _under_zero(_model(options), config, ids),
    }


def _model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        llama_config(options.width, options.layers, VOCABULARY, options.seq_len)
    )


def _ours(
    options: argparse.Namespace, adapter: AdapterConfig, ids: Tensor
) -> Contender:
    model = prefer_document_attention(_model(options))
    trained = inject(model, adapter).trainable_params
    chunk_loss(model)
    engine = initialize(model=model, config=zero3_config(options.rows))[0]
    return trained, _engine_step(engine, _own_loss(engine, ids))


def _peft(options: argparse.Namespace) -> Any:
    adapter = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(_model(options), adapter)


def _fused(model: Any, rank: int) -> Any:
    """The model with such a LoRA in place of each linear layer of its decoder
    layers."""
    model.requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, FusedLoRA(child, rank))
    return model


def _under_ddp(model: Any, ids: Tensor) -> Contender:
    loss = _plain_loss(DistributedDataParallel(model), ids)
    return count_trained(model), adamw_step(model, loss)


def _under_zero(model: Any, config: dict[str, Any], ids: Tensor) -> Contender:
    trained = count_trained(model)
    engine = initialize_full(model=model, config=config)[0]
    return trained, _engine_step(engine, _plain_loss(engine, ids))


def _frozen_step(model: Any, ids: Tensor) -> Step:
    prefer_document_attention(model)
    model.requires_grad_(False)
    model.enable_input_require_grads()
    chunk_loss(model)
    loss = _own_loss(model, ids)
    return lambda: loss().backward()


def _engine_step(engine: Any, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        engine.backward(loss())
        engine.step()

    return step


def _own_loss(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """The product's loss of rows of one document each, given as the training program's
    loader gives them."""
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    labels = ids.roll(-1, dims=1)
    batch = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "documents": Documents.of(positions),
    }
    return lambda: token_nll(model, batch) / ids.numel()


def _plain_loss(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


# -- time ------------------------------------------------------------------------------


def _seconds_together(step: Step) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    started = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - started


def _speedup(seconds: list[float], of_baseline: list[float]) -> str:
    ratios = (base / mine for mine, base in zip(seconds, of_baseline, strict=True))
    return f"{median(ratios):.2f}"


if __name__ == "__main__":
    cli.run(main)
