"""How much of a new domain is a change of how often each token comes: one bias a token, trained on the logits.

    logits(x) + b            b (vocabulary): the only thing that is trained; the model itself is left as it is

A run of tools/bench/learning.py (`shift: true` in its methods), with the batches, schedule and evaluation sets of the
other methods: what it closes of the gap to full training needs neither an adapter nor embeddings.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM

from mora_ds.common.files import write_json_atomic
from mora_ds.data import PackedDataset
from mora_ds.eval.perplexity import named_sets
from mora_ds.models.attention import prefer_documents
from mora_ds.remora.schedule import Schedule, schedule_kind
from mora_ds.runtime import cli
from tools.bench.packed import packed, perplexity, token_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--settings", required=True, help="JSON: the flags of the training program that matter here")
    settings = json.loads(parser.parse_args().settings)
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    train, sets = _data(settings)
    model = prefer_documents(AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]).float().eval())
    bias = torch.zeros(model.config.vocab_size, requires_grad=True)
    schedule = Schedule(
        schedule_kind(settings["lr_scheduler_type"]), settings["learning_rate"], settings["max_steps"],
        settings["warmup_steps"], settings["min_lr_ratio"],
    )  # fmt: skip
    optimizer = torch.optim.AdamW([bias], weight_decay=0.0)
    rows, metrics = settings["per_device_train_batch_size"], list[dict[str, Any]]()
    for step in range(settings["max_steps"]):
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(step, [])
        loss = token_losses(model, train.batch(step, rows), bias).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings["logging_steps"] == 0:
            metrics.append({"step": step + 1, "loss": loss.item()})
        if (step + 1) % settings["eval_steps"] == 0 or step + 1 == settings["max_steps"]:
            found = {
                name: perplexity(model, data, settings["per_device_eval_batch_size"], bias)
                for name, data in sets.items()
            }
            metrics.append({"step": step + 1, "eval": found})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in metrics), encoding="utf-8")
    write_json_atomic(folder / "summary.json", {"trainable_params": bias.numel(), "perplexity_after": found})


def _data(settings: dict[str, Any]) -> tuple[PackedDataset, dict[str, PackedDataset]]:
    """The training data, and the evaluation sets by name."""
    cut = partial(packed, settings["model_name_or_path"], settings["cache_dir"], settings["seq_len"])
    (text,) = settings["train_files"]
    sets = named_sets(settings["eval_files"])
    return cut(text, seed=settings["seed"]), {name: cut(path, shuffle=False) for name, path in sets.items()}


if __name__ == "__main__":
    cli.run(main)
