"""One run of the training program with one thing changed that is no option of it: what `trial` of a method tries.

python tools/bench/learning_trials.py TRIAL OLD [--flags of the training program]

rows-K       with --train_embeddings: of the embeddings only the K rows whose frequency grows most from OLD, a text
             that the base knows, to the text that is learned
drift-K      the K rows whose frequency changes most, up or down
bias         one bias for each token on the logits, beside the adapter
scale-S      without merges: delta = S / r_hat * expand(M)
hadamard     delta = W / rms(W) * expand(M), element by element, in place of expand(M)
adjoint      with --optimizer_reset keep: a merge carries the first moment over into the next grouping, through the
             delta that it stands for; the second one becomes its mean
shrink       cycles that become shorter: merges where the steps that are left are --merge_every times a square number
rms          Muon's updates of M times 0.2 sqrt(r_hat), so that each has the RMS 0.2 whatever its side
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_ds.adapters.inject import mora_layers
from mora_ds.adapters.layer import MoRALinear
from mora_ds.adapters.ops.mora import OperatorSpec, adjoint, delta_weight
from mora_ds.commands.pretrain import main as pretrain
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.data import load_corpus, load_tokenizer
from mora_ds.engine import muon
from mora_ds.engine.optimizer_view import view_of
from mora_ds.remora.merge import ReMoRA
from mora_ds.remora.schedule import Schedule
from mora_ds.runtime import cli
from mora_ds.train import adapter_job

BIAS_RATE = 10.0
"""By how much the learning rate of the bias is above that of M."""
RMS = 0.2


def main() -> None:
    trial, old, *sys.argv[1:] = sys.argv[1:]
    kind, _, count = trial.partition("-")
    arguments = parse(sys.argv[1:])
    if kind in ("rows", "drift"):
        (new,) = arguments.data.train_files
        rows = _rows(arguments.model.model_name_or_path, new, old, int(count), kind)
        _after_injection(lambda model: _train_rows(model, rows))
    elif trial == "adjoint":
        _carry_moments()
    elif trial == "shrink":
        _shrink_cycles()
    elif trial == "bias":
        _after_injection(_add_bias)
    elif kind == "scale":
        _scale_by_side(int(count))
    elif trial == "hadamard":
        MoRALinear.product = _hadamard  # type: ignore[method-assign, assignment]
    elif trial == "rms":
        _match_rms()
    else:
        raise UserError(f"TRIAL {trial}: the first lines of {Path(__file__).name} name them")
    pretrain()


def _after_injection(change: Callable[[Any], int]) -> None:
    """`change` the model as soon as it has its adapters; it returns how many parameters more are trained."""
    inject = adapter_job.inject

    def injected(model: Any, *others: Any) -> Any:
        report = inject(model, *others)
        return replace(report, other_trainable_params=report.other_trainable_params + change(model))

    adapter_job.inject = injected  # type: ignore[assignment]


# -- rows --------------------------------------------------------------------------------------------------------------


def _rows(model: str | None, new: str, old: str, count: int, kind: str) -> Tensor:
    tokenizer = load_tokenizer(model)  # type: ignore[arg-type]
    shares = []
    for path in (old, new):
        ids = [each for text in load_corpus([path]).texts() for each in tokenizer(text)["input_ids"]]
        shares.append(torch.bincount(torch.tensor(ids), minlength=len(tokenizer)).double() / len(ids))
    growth = shares[1] - shares[0]
    return (growth.abs() if kind == "drift" else growth).topk(count).indices


def _train_rows(model: Any, rows: Tensor) -> int:
    """The others' gradients are zero, and AdamW without weight decay leaves them as they are."""
    tables = {id(each): each for each in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    frozen = 0
    for table in (each for each in tables.values() if isinstance(each, nn.Parameter)):
        table.register_hook(torch.zeros(len(table), 1).index_fill_(0, rows, 1.0).mul)
        frozen += table.numel() - len(rows) * table.shape[1]
    return -frozen


# -- merges ------------------------------------------------------------------------------------------------------------


def _carry_moments() -> None:
    start = ReMoRA._start_cycle

    def carried(self: ReMoRA, cycle: int) -> float:
        layers = list(mora_layers(self.engine.module).values())
        old = [layer.spec for layer in layers]
        zeros = start(self, cycle)
        for layer, before in zip(layers, old, strict=True):
            first, second = _moments(self.engine, layer.value)
            first.copy_(carry(before, layer.spec, first))  # type: ignore[arg-type]
            second.fill_(second.mean())
        return zeros

    ReMoRA._start_cycle = carried  # type: ignore[method-assign]


def carry(old: OperatorSpec, new: OperatorSpec, moment: Tensor) -> Tensor:
    """The `moment` (r_hat, r_hat) of M under rotate, in another grouping: the new one's adjoint, applied to the least
    gradient of W that has this moment in the old one (to rounding, where r_hat divides both sides of W)."""
    copies = max(old.blocks_in, old.blocks_out)
    return adjoint(new, delta_weight(old, moment / copies))


def _moments(engine: Any, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Adam's two of one matrix, on the one process that there is."""
    ((flat, span),) = [
        (flat, span) for flat in view_of(engine).flats(0) for span in flat.spans if span.parameter is parameter
    ]
    first, second = (
        flat.state[key].view(-1).narrow(0, span.offset, span.numel).view_as(parameter)
        for key in ("exp_avg", "exp_avg_sq")
    )
    return first, second


def _shrink_cycles() -> None:
    merges_after = Schedule.merges_after

    def shrunk(self: Schedule, steps_done: int) -> bool:
        left = (self.total_steps - steps_done) // self.merge_every
        return isqrt(left) ** 2 == left and merges_after(self, steps_done)

    Schedule.merges_after = shrunk  # type: ignore[method-assign]


# -- the others --------------------------------------------------------------------------------------------------------
def _add_bias(model: Any) -> int:
    head = model.get_output_embeddings()
    head.shift = nn.Parameter(torch.zeros(len(head.weight)))
    head.register_forward_hook(lambda module, _, logits: logits + BIAS_RATE * module.shift)
    return len(head.weight)


def _hadamard(layer: MoRALinear, x: Tensor, square: Tensor, path: Any) -> Tensor:
    weight = layer.stored_weight
    scale = weight / weight.square().mean().sqrt()
    return F.linear(x, weight + scale * delta_weight(layer.spec, square), layer.bias)


def _scale_by_side(side: int) -> None:
    product = MoRALinear.product

    def scaled(layer: MoRALinear, x: Tensor, square: Tensor, path: Any) -> Tensor:
        return product(layer, x, square * (side / len(square)), path)

    MoRALinear.product = scaled  # type: ignore[method-assign, assignment]


def _match_rms() -> None:
    muon.load_kernels()
    original_muon: Any = sys.modules["deepspeed.runtime.zero.muon.original_muon"]
    update = original_muon.muon_update

    def matched(*given: Any, **named: Any) -> Tensor:
        found: Tensor = update(*given, **named)
        return found * RMS * max(found.shape[-2:]) ** 0.5

    original_muon.muon_update = matched


if __name__ == "__main__":
    cli.run(main, restartable=True)
