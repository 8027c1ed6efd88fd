"""Plan the memory and traffic of Llama 7B and 70B anew, with every method that the
documentation compares.

python tools/plans.py           writes docs/results/data/plans.json, of which tools/docs.py makes tables
"""

import json
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "results" / "data"

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "7B": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "70B": {
        **LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
}  # fmt: skip
METHODS = {
    "MoRA r=8": "--mora_rank 8",
    "default recipe": "--mora_rank 8 --operator rotate --train_embedding_rank 16 --optimizer muon",
    "whole embeddings": "--mora_rank 8 --operator rotate --train_embeddings --train_head --optimizer muon",
    "MoRA r=256": "--mora_rank 256",
    "MoRA r=8, 8-bit base": "--mora_rank 8 --base_bits 8",
    "LoRA r=8, ZeRO-2": "--adapter lora --mora_rank 8 --deepspeed configs/zero2.json",
    "full training, ZeRO-3": "--adapter full",
}
GPUS = (2, 8, 64, 512)
MEMORY = {"7B": (8, 80), "70B": (64, 192)}
"""Model -> GPUs and the GB of one."""


def main() -> None:
    """Write data/plans.json: what `mora-ds plan --json` says of every method, and the
    command.
    """
    plans = [
        _plan(model, method, *cluster)
        for model, cluster in MEMORY.items()
        for method in METHODS
    ]
    for method in METHODS:
        plans += [_plan("7B", method, gpus, 80) for gpus in GPUS if gpus != MEMORY["7B"][0]]
    DATA.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"models": MODELS, "plans": plans}, indent=1)
    (DATA / "plans.json").write_text(text + "\n", encoding="utf-8")


def _plan(model: str, method: str, gpus: int, memory: int) -> dict[str, Any]:
    # Not above: it imports torch, which the tables do not need
    from mora_ds.commands import plan

    flags = f"--gpus {gpus} --gpu_memory {memory} --seq_len 4096 --micro_batch 1"
    flags += f" --gradient_checkpointing {METHODS[method]}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(MODELS[model]), encoding="utf-8")
        argv = ["plan.py", "--model", str(config), *flags.split(), "--json"]
        with mock.patch.object(sys, "argv", argv), redirect_stdout(StringIO()) as printed:
            plan.main()
    answer = json.loads(printed.getvalue())
    print(f"{model} {method} {gpus}")
    facts = {
        key: answer[key]
        for key in (
            "bytes",
            "bytes_gathered",
            "bytes_reduced",
            "bytes_sent",
            "trained_elements",
        )
    }
    return {"model": model, "method": method, "gpus": gpus, "flags": flags, **facts}


def plans() -> dict[tuple[str, str, int], dict[str, Any]]:
    """data/plans.json by model, method and number of GPUs."""
    rows = json.loads((DATA / "plans.json").read_text(encoding="utf-8"))["plans"]
    return {(plan["model"], plan["method"], plan["gpus"]): plan for plan in rows}


def traffic() -> dict[str, list[float]]:
    """{method: GB that one GPU sends in a step of Llama 7B, for each of `GPUS`}."""
    of_7b = {method: [plans()["7B", method, gpus] for gpus in GPUS] for method in METHODS}
    full = of_7b["full training, ZeRO-3"]
    lora = of_7b["LoRA r=8, ZeRO-2"]

    def sent(method: str) -> list[float]:
        return [plan["bytes_sent"] / 1e9 for plan in of_7b[method]]

    return {
        "full training, ZeRO-3": sent("full training, ZeRO-3"),
        # ZeRO-3 gathers frozen parameters like others: the all-gathers of the full plan,
        # and LoRA's own reductions.
        "LoRA r=8, ZeRO-3, base sharded": [
            (whole["bytes_gathered"] + adapter["bytes_reduced"]) * (gpus - 1) / gpus / 1e9
            for whole, adapter, gpus in zip(full, lora, GPUS, strict=True)
        ],
        "mora_ds, MoRA r=256": sent("MoRA r=256"),
        "mora_ds, whole embeddings": sent("whole embeddings"),
        "mora_ds, default recipe": sent("default recipe"),
        "mora_ds, MoRA r=8": sent("MoRA r=8"),
        "LoRA r=8, ZeRO-2 (as PEFT)": sent("LoRA r=8, ZeRO-2"),
    }


if __name__ == "__main__":
    main()
