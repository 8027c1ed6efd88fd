"""Compute what a micro-batch costs each process by shapes only: tensor, data and sequence parallelism.

python tools/tp_cost.py MODEL_FOLDER_OR_CONFIG.json [--mora_rank 256] [--ranks 8] [--degrees 2 8] [--tokens 4096]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout, not installed

import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.common.errors import COUNT, UserError, out_of_bounds, refuse
from mora_ds.models.load import make_model, named_config
from mora_ds.planning.costs import cost_table
from mora_ds.runtime import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a config JSON, or the folder of a model")
    parser.add_argument("--mora_rank", type=int, default=256)
    parser.add_argument("--operator", default="auto")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--degrees", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per micro-batch and process")
    parser.add_argument("--tp_segments", type=int, default=8)
    given = parser.parse_args()
    counts = [(name, getattr(given, name), COUNT) for name in ("ranks", "tokens", "tp_segments")]
    refuse(out_of_bounds([*counts, *(("degrees", degree, COUNT) for degree in given.degrees)]))
    if any(given.ranks % degree for degree in given.degrees):
        raise UserError(f"--degrees must divide --ranks {given.ranks}")
    plain = MoRAConfig(rank=given.mora_rank, operator=given.operator)
    gathered = model_of(given.config, plain)
    shares = plain.kind is OperatorKind.SHARE
    aligned = None
    if shares:
        aligned = model_of(
            given.config, MoRAConfig(given.mora_rank, operator=given.operator, segments=given.tp_segments)
        )
    layers = gathered.config.get_text_config().num_hidden_layers
    sizes = sorted({layer.value.shape[0] for layer in mora_layers(gathered).values()})
    print(
        f"{given.ranks} ranks, {given.tokens:,} tokens each, forward and backward, {plain.title}, rank "
        f"{given.mora_rank}, r_hat {', '.join(map(str, sizes))}; a layer ({layers} in all) and rank\n"
    )
    print(f"{'':<46} {'TMAC':>8} {'M elements':>11}")
    for row in cost_table(gathered, aligned, given.ranks, given.degrees, given.tokens):
        print(f"{row.name:<46} {row.macs / layers / 1e12:>8.2f} {row.wire / layers / 1e6:>11.0f}")


def model_of(path: Path, config: MoRAConfig) -> Any:
    """The model of the config in `path` with adapters, on the meta device."""
    read = named_config(str(path), flag="CONFIG")
    with torch.device("meta"):
        model = make_model(read, f"CONFIG {path}")
    inject(model, config)
    return model


if __name__ == "__main__":
    cli.run(main)
