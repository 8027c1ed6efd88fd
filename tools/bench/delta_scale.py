"""What a run has learned and forgotten as its update is scaled from nothing to more than all of it.

    python tools/bench/delta_scale.py RUN [--scales 0 0.2 0.4 0.6 0.8 1 1.2] [--json docs/results/data/delta_scale.json]

RUN is the output folder of a training run with two evaluation sets, the old text first. Each scale is
`mora-ds export --delta_scale S` in memory, evaluated as the run evaluates; beside it stand the evaluations that the run
made on its way, which is what stopping earlier would have given.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mora_ds.checkpoint.layout import METRICS_FILE, RUN_FILE, TOKENIZER_FOLDER
from mora_ds.common.errors import UserError
from mora_ds.common.files import load_yaml
from mora_ds.data import PackedDataset
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.combine import Mix, mixed
from mora_ds.eval.perplexity import named_sets
from mora_ds.models.attention import prefer_documents
from mora_ds.runtime import cli
from tools.bench.packed import packed, perplexity
from tools.bench.report import Report, json_flag


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a training run")
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 0.2, 0.4, 0.6, 0.8, 1, 1.2], metavar="S")
    json_flag(parser)
    options = parser.parse_args()
    mixes = [Mix(delta_scale=scale) for scale in options.scales]
    for mix in mixes:
        mix.check()
    settings = load_yaml(str(options.run / RUN_FILE), "RUN's settings")
    sets = named_sets(settings["eval_files"])
    if len(sets) != 2:
        raise UserError(f"RUN: {options.run} has {len(sets)} evaluation sets; it takes two, the old text first")
    data = {
        name: packed(options.run / TOKENIZER_FOLDER, options.run / "tokens", settings["seq_len"], path, shuffle=False)
        for name, path in zip(("old", "new"), sets.values(), strict=True)
    }
    report = Report(options)
    report.say("perplexity of a run whose update is multiplied, and of the same run at earlier steps")
    report.points = {
        "scales": [{"scale": mix.delta_scale, **_scaled(options.run, settings, data, mix)} for mix in mixes],
        "steps": _earlier(options.run, list(sets)),
    }
    for name, column in (("scales", "scale"), ("steps", "step")):
        rows = [[f"{row[column]:g}", f"{row['new']:.1f}", f"{row['old']:.1f}"] for row in report.points[name]]
        report.show(name, [[column, "new", "old"], *rows])
    report.write()


def _scaled(run: Path, settings: dict[str, Any], data: dict[str, PackedDataset], mix: Mix) -> dict[str, float]:
    with mixed(run, mix) as folder:
        model = prefer_documents(load_adapter(settings["model_name_or_path"], folder))
    batch = settings["per_device_eval_batch_size"]
    return {name: perplexity(model, each, batch) for name, each in data.items()}


def _earlier(run: Path, names: list[str]) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    old, new = names
    return [{"step": row["step"], "new": row["eval"][new], "old": row["eval"][old]} for row in rows if "eval" in row]


if __name__ == "__main__":
    cli.run(main)
