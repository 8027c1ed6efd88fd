"""Draw the figures of the documentation as SVG, from the JSON in docs/results/data.

    python tools/figures.py            draws docs/assets/*.svg (needs matplotlib)
    python tools/figures.py --plan     plans the memory and traffic of Llama 7B and 70B anew first: data/plans.json
    python tools/figures.py --learning FILE --output FOLDER       those of tools/bench/learning.py --json FILE alone

Text stays text, and colours follow the reader's light or dark scheme. No figure is drawn from numbers in this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout, not installed

from tools import figures_learning
from tools.figures_style import BASE, INK, OURS, SECOND, axes, save

ROOT = Path(__file__).resolve().parents[1]
DATA, ASSETS = ROOT / "docs" / "results" / "data", ROOT / "docs" / "assets"

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
    "MoRA r=8": ["--mora_rank", "8"],
    "default recipe": ["--mora_rank", "8", "--operator", "rotate", "--train_embeddings", "--train_head"],
    "MoRA r=256": ["--mora_rank", "256"],
    "MoRA r=8, 8-bit base": ["--mora_rank", "8", "--base_bits", "8"],
    "LoRA r=8, ZeRO-2": ["--adapter", "lora", "--mora_rank", "8", "--deepspeed", str(ROOT / "configs" / "zero2.json")],
    "full training, ZeRO-3": ["--adapter", "full"],
}
GPUS = (2, 8, 64, 512)
MEMORY = {"7B": (8, 80), "70B": (64, 192)}
"""Model -> GPUs and the GB of one."""


# -- plans -------------------------------------------------------------------------------------------------------------
def write_plans() -> None:
    """data/plans.json: what `mora-ds plan --json` says of every method, and the command."""
    plans = []
    for model, (gpus, memory) in MEMORY.items():
        for method in METHODS:
            plans.append(_plan(model, method, gpus, memory))
    for method in METHODS:
        plans += [_plan("7B", method, gpus, 80) for gpus in GPUS if gpus != MEMORY["7B"][0]]
    DATA.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"models": MODELS, "plans": plans}, indent=1)
    (DATA / "plans.json").write_text(text + "\n", encoding="utf-8")


def _plan(model: str, method: str, gpus: int, memory: int) -> dict[str, Any]:
    from mora_ds.commands import plan  # not above: it imports torch, which drawing does not need

    flags = ["--gpus", str(gpus), "--gpu_memory", str(memory), "--seq_len", "4096", "--micro_batch", "1"]
    flags += ["--gradient_checkpointing", *METHODS[method]]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[model]), encoding="utf-8")
        argv = ["plan.py", "--model", folder, *flags, "--json"]
        with mock.patch.object(sys, "argv", argv), redirect_stdout(StringIO()) as printed:
            plan.main()
    answer = json.loads(printed.getvalue())
    print(f"{model} {method} {gpus}")
    shown = [flag.replace(str(ROOT) + "/", "") for flag in flags]
    kept = {key: answer[key] for key in ("bytes", "bytes_gathered", "bytes_reduced", "bytes_sent", "trained_elements")}
    return {"model": model, "method": method, "gpus": gpus, "flags": " ".join(shown), **kept}


def plans() -> dict[tuple[str, str, int], dict[str, Any]]:
    """data/plans.json by model, method and number of GPUs."""
    found = json.loads((DATA / "plans.json").read_text(encoding="utf-8"))["plans"]
    return {(plan["model"], plan["method"], plan["gpus"]): plan for plan in found}


def sharded_base(full: dict[str, Any], lora: dict[str, Any]) -> float:
    """Bytes that a GPU sends in a step of LoRA under ZeRO-3 with the base sharded too.

    The all-gathers of the full plan, for ZeRO-3 gathers frozen parameters like others, and LoRA's own reductions.
    """
    gpus: int = full["gpus"]
    return (full["bytes_gathered"] + lora["bytes_reduced"]) * (gpus - 1) / gpus


def traffic(known: dict[tuple[str, str, int], dict[str, Any]]) -> dict[str, list[float]]:
    """{method: GB that one GPU sends in a step of Llama 7B, for each of `GPUS`}."""
    lora = [known["7B", "LoRA r=8, ZeRO-2", gpus] for gpus in GPUS]
    full = [known["7B", "full training, ZeRO-3", gpus] for gpus in GPUS]
    sent = {
        "full training, ZeRO-3": [plan["bytes_sent"] for plan in full],
        "LoRA r=8, ZeRO-3, base sharded": [sharded_base(*pair) for pair in zip(full, lora, strict=True)],
        "mora_ds, MoRA r=256": [known["7B", "MoRA r=256", gpus]["bytes_sent"] for gpus in GPUS],
        "mora_ds, default recipe": [known["7B", "default recipe", gpus]["bytes_sent"] for gpus in GPUS],
        "mora_ds, MoRA r=8": [known["7B", "MoRA r=8", gpus]["bytes_sent"] for gpus in GPUS],
        "LoRA r=8, ZeRO-2 (as PEFT)": [plan["bytes_sent"] for plan in lora],
    }
    return {name: [value / 1e9 for value in values] for name, values in sent.items()}


# -- figures -----------------------------------------------------------------------------------------------------------
def draw_memory() -> None:
    """memory.svg: what one GPU holds, as stacked bars."""
    known = plans()
    figure, both = axes(2, 1, (5, 5.4))
    shown = [name for name in METHODS if name != "MoRA r=256"]
    for axis, (model, (gpus, memory)) in zip(both, MEMORY.items(), strict=True):
        parts: dict[str, list[float]] = {"base": [], "other static memory": [], "peak above it": []}
        for method in shown:
            sizes = known[model, method, gpus]["bytes"]
            parts["base"].append(sizes["base"] / 1e9)
            parts["other static memory"].append((sizes["held"] - sizes["base"]) / 1e9)
            parts["peak above it"].append((sizes["peak"] - sizes["held"]) / 1e9)
        left = [0.0] * len(shown)
        for (name, values), colour in zip(parts.items(), (BASE, OURS, SECOND), strict=True):
            axis.barh(shown, values, left=left, color=colour, label=name, height=0.6)
            left = [start + value for start, value in zip(left, values, strict=True)]
        axis.axvline(memory, color=INK, linewidth=1, linestyle="--")
        axis.set_title(f"Llama {model}, {gpus} GPUs of {memory} GB", fontsize=12, color=INK)
        axis.set_xlim(0, 1.05 * memory)
        axis.set_xticks([memory * quarter / 4 for quarter in range(5)])
        axis.invert_yaxis()
    both[1].set_xlabel("GB on one GPU (dashed: what it has)")
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, labelcolor=INK, columnspacing=1,
                  handlelength=1.2)  # fmt: skip
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(figure, ASSETS / "memory.svg", "Planned memory of one GPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--plan", action="store_true", help="plan memory and traffic anew: docs/results/data/plans.json"
    )
    parser.add_argument("--learning", type=Path, metavar="FILE", help="draw only this JSON of tools/bench/learning.py")
    parser.add_argument("--output", type=Path, default=ASSETS, metavar="FOLDER", help="where those are written")
    options = parser.parse_args()
    if options.learning is not None:
        figures_learning.draw(options.learning, options.output)
        return
    if options.plan:
        write_plans()
    draw_memory()
    figures_learning.draw(DATA / "learning.json", ASSETS)
    figures_learning.draw_long(DATA / "learning_long.json", ASSETS)
    figures_learning.draw_long(DATA / "learning_long_13m.json", ASSETS)
    figures_learning.draw_long(DATA / "learning_scratch.json", ASSETS, from_scratch=True)


if __name__ == "__main__":
    main()
