"""Plan memory and traffic of a run on any cluster from the config of its model; no weights are read.

mora-ds plan --model MODEL_FOLDER_OR_NAME_OR_CONFIG.json --gpus 64 --gpu_memory 80 --seq_len 4096
    [--mora_rank 8 ...] [--gpus_per_node 8] [--json]

Without --micro_batch it recommends a micro-batch size, gradient checkpointing, and the tensor and sequence parallel
sizes; with it, it plans the given settings. Where the base does not fit it plans --base_device host.
"""

import argparse
import json
from dataclasses import asdict, replace

import torch

from mora_ds.common.errors import UserError
from mora_ds.common.files import shipped
from mora_ds.common.untrusted import expanded
from mora_ds.config.adapter import AdapterArguments, AdapterKind
from mora_ds.config.data import ModelArguments
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.base_device import BaseDevice
from mora_ds.engine.ds_config import resolve_ds_config
from mora_ds.models.attention import NAME
from mora_ds.models.load import named_config
from mora_ds.planning.plan import Cluster, Planner, place_base, recommend, recommend_sharding
from mora_ds.planning.report import as_json, report
from mora_ds.planning.step import Work
from mora_ds.train.attention import implementation_of


def main() -> None:
    options = _options()
    cluster = Cluster(options.gpus, options.gpus_per_node, options.gpu_memory * 1e9)
    planner = Planner(_work(options), cluster, _ds_config(options), options.accumulation, options.cpu)
    device, chosen = BaseDevice(options.base_device), None
    if options.micro_batch is None:
        both = planner.work.adapter is not None and not options.cpu
        places = [BaseDevice.DEVICE, *([BaseDevice.HOST] if both else [])]
        for place in places if device is BaseDevice.AUTO else [device]:
            planner = place_base(planner, place)
            if chosen := recommend(planner, options.rows):
                break
    else:
        planner = place_base(planner, device)
    plan = chosen or planner.plan()
    sharding = recommend_sharding(planner, plan)
    if options.json:
        facts = {"recommended": chosen is not None, "sharding": asdict(sharding)}
        print(json.dumps({**as_json(plan), **facts}, indent=2))
        return
    if options.micro_batch is None:
        print("recommended:" if chosen else "nothing fits; the smallest there is:")
    print(report(plan, sharding=sharding))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gpus", type=int, required=True, help="number of processes, one per GPU")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="memory of a GPU in GB (10^9 bytes)")
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="plan for processes on CPUs")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--adapter", default="mora", choices=["mora", "lora", "full"])
    parser.add_argument("--mora_rank", type=int, default=8)
    parser.add_argument("--operator", default="auto")
    parser.add_argument("--target_modules", nargs="+", default=["all-linear"])
    parser.add_argument("--base_bits", type=int, default=AdapterArguments.base_bits)
    parser.add_argument("--base_device", default="auto", choices=[each.value for each in BaseDevice])
    parser.add_argument("--train_embeddings", action="store_true")
    parser.add_argument("--train_embedding_rank", type=int, default=0)
    parser.add_argument("--train_norms", action="store_true")
    parser.add_argument("--train_head", action="store_true")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--deepspeed", help="a DeepSpeed JSON; default: ZeRO-3")
    parser.add_argument("--micro_batch", type=int, help="sequences per micro-batch and process; default: recommended")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--rows", type=int, help="upper limit of sequences per micro-batch over all processes")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--sequence_parallel_size", type=int, default=1)
    parser.add_argument("--no_document_mask", action="store_true")
    parser.add_argument("--attn_implementation", default="auto")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name in ("gpus", "gpus_per_node", "gpu_memory", "seq_len", "micro_batch", "accumulation", "rows",
                 "tensor_parallel_size", "sequence_parallel_size"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} must be above 0, got {value}")
    return options


def _work(options: argparse.Namespace) -> Work:
    adapter = AdapterArguments(
        adapter=options.adapter,
        mora_rank=options.mora_rank,
        operator=options.operator,
        target_modules=options.target_modules,
        train_embeddings=options.train_embeddings,
        train_embedding_rank=options.train_embedding_rank,
        train_norms=options.train_norms,
        train_head=options.train_head,
        base_bits=options.base_bits,
    )
    if options.adapter == AdapterKind.FULL.value and options.base_bits != AdapterArguments.base_bits:
        raise UserError(f"--base_bits {options.base_bits}: --adapter full leaves no weight frozen")
    config = named_config(shipped(options.model), options.trust_remote_code, "--model")
    model = ModelArguments(attn_implementation=options.attn_implementation)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return Work(
        config=config,
        adapter=None if options.adapter == AdapterKind.FULL.value else adapter.config(seed=42),
        seq_len=options.seq_len,
        micro_batch=options.micro_batch or 1,
        dtype=dtypes[options.dtype],
        checkpointing=options.gradient_checkpointing or options.micro_batch is None,
        tensor_parallel=options.tensor_parallel_size,
        sequence_parallel=options.sequence_parallel_size,
        document_mask=not options.no_document_mask,
        attn_implementation=model.implementation,
        by_documents=implementation_of(model, config) == NAME,
        trust_remote_code=options.trust_remote_code,
    )


def _ds_config(options: argparse.Namespace) -> dict[str, object]:
    settings = TrainingArguments(
        per_device_train_batch_size=options.micro_batch or 1, gradient_accumulation_steps=options.accumulation
    )
    flags = replace(settings.engine_settings(), bf16=options.dtype == "bf16", fp16=options.dtype == "fp16")
    replicas = options.gpus // (options.tensor_parallel_size * options.sequence_parallel_size)
    file = None if options.deepspeed is None else expanded(shipped(options.deepspeed), "--deepspeed")
    return resolve_ds_config(file, flags, max(1, replicas))
