"""Plan the memory and traffic of Llama 7B and 70B again, with every method that the
documentation compares.

python tools/plans.py           writes docs/results/data/plans.json, of which tools/docs.py makes tables
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "docs" / "results" / "data"

MODELS: dict[str, dict[str, Any]] = yaml.safe_load("""
7B: &llama
  architectures: [LlamaForCausalLM]
  model_type: llama
  hidden_act: silu
  rms_norm_eps: 1.0e-5
  tie_word_embeddings: false
  vocab_size: 32000
  max_position_embeddings: 4096
  hidden_size: 4096
  intermediate_size: 11008
  num_hidden_layers: 32
  num_attention_heads: 32
  num_key_value_heads: 32
70B:
  <<: *llama
  hidden_size: 8192
  intermediate_size: 28672
  num_hidden_layers: 80
  num_attention_heads: 64
  num_key_value_heads: 8
""")
METHODS = {
    "MoRA r=8": "--mora_rank 8",
    "default recipe": "--mora_rank 8 --operator rotate --train_embedding_rank 16",
    "whole embeddings": "--mora_rank 8 --operator rotate --train_embeddings --train_head --optimizer muon",
    "MoRA r=256": "--mora_rank 256",
    "MoRA r=8, 8-bit base": "--mora_rank 8 --base_bits 8",
    "LoRA r=8, ZeRO-2": "--adapter lora --mora_rank 8 --deepspeed configs/zero2.json",
    "full training, ZeRO-3": "--adapter full",
}
GPUS = (2, 8, 64, 512)
MEMORY = {"7B": (8, 80), "70B": (64, 192)}
"""Model -> GPUs and the GB of one."""
FACTS = ("bytes", "bytes_gathered", "bytes_reduced", "bytes_sent", "trained_elements")
"""The keys of a plan that are written."""


def main() -> None:
    """Write data/plans.json: what `mora-ds plan --json` says of every method."""
    clusters = [(model, gpus, memory) for model, (gpus, memory) in MEMORY.items()]
    clusters += [("7B", gpus, 80) for gpus in GPUS if gpus != MEMORY["7B"][0]]
    answers = [_plan(method, *cluster) for cluster in clusters for method in METHODS]
    text = json.dumps({"models": MODELS, "plans": answers}, indent=1)
    (DATA / "plans.json").write_text(text + "\n", encoding="utf-8")


def _plan(method: str, model: str, gpus: int, memory: int) -> dict[str, Any]:
    flags = f"--gpus {gpus} --gpu_memory {memory} --seq_len 4096 --micro_batch 1"
    flags += f" --gradient_checkpointing {METHODS[method]}"
    print(f"{model} {method} {gpus}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(MODELS[model]), encoding="utf-8")
        command = f"-m mora_ds plan --model {config} --json {flags}".split()
        planned = subprocess.check_output([sys.executable, *command], cwd=ROOT)
    answer = json.loads(planned)
    return {
        "model": model,
        "method": method,
        "gpus": gpus,
        "flags": flags,
        **{fact: answer[fact] for fact in FACTS},
    }


def plans() -> dict[tuple[str, str, int], dict[str, Any]]:
    """data/plans.json by model, method and number of GPUs."""
    rows = json.loads((DATA / "plans.json").read_text(encoding="utf-8"))["plans"]
    return {(plan["model"], plan["method"], plan["gpus"]): plan for plan in rows}


if __name__ == "__main__":
    main()
