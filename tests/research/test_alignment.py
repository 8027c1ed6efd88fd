"""The alignment loss is that of the dense delta, with its gradient, for any number of
processes and accumulation.
"""

import pytest
import torch
from torch.testing import assert_close

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers, set_cycle
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.common.errors import RunError
from mora_ds.deploy.export import export_merged
from mora_ds.models.base import BaseCheckpoint, write_own_base
from mora_ds.models.load import LoadedBase
from mora_ds.research.alignment import FLOOR, Alignment, leading_of_base
from mora_ds.runtime.ranks import Ranks
from tests.helpers.errors import user_error
from tests.helpers.jobs import curve, refusal, research, rows, run
from tests.helpers.models import causal_loss, enable_checkpointing, tiny_model, tokens
from tests.helpers.operators import random
from tests.helpers.resume import assert_close_runs

ALONE = Ranks(0, 1, 0, None, timeout_s=60)
EVERY = [kind.value for kind in OperatorKind]


def test_leading_directions_are_those_of_the_weight(tmp_path):
    _, _, leading = aligned_model(tmp_path, "share")
    layer = "model.layers.1.mlp.up_proj"
    weight = BaseCheckpoint.open(tmp_path / "base").read(f"{layer}.weight").double()
    directions = leading[layer]
    values = torch.linalg.svdvals(weight)[:4]
    right = directions.right.double()
    spanned = directions.left.double() @ weight @ right.T
    assert_close(spanned, torch.diag(values), rtol=1e-6, atol=1e-6)
    largest = right.gather(1, right.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all(), "fixed signs"
    assert directions.norm == pytest.approx(weight.norm().item(), rel=1e-6)


def test_a_weight_that_is_not_finite_or_too_small_is_refused(tmp_path):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[1, 2] = float("nan")
    loaded = loaded_base(model, tmp_path)
    with user_error(r"layers\.0\.mlp\.up_proj\.weight has NaN or infinite values"):
        leading_of_base(MoRAConfig(), loaded, 4, ALONE)
    with user_error(
        r"alignment_rank 17: model\.layers\.0\.self_attn\.k_proj has 16 singular"
    ):
        leading_of_base(MoRAConfig(), loaded, 17, ALONE)


# -- on a model ------------------------------------------------------------------------


def loaded_base(model, folder):
    """As a run loads it, from files in `folder`."""
    keys = {name: name for name, _ in model.named_parameters()}
    return LoadedBase(model, write_own_base(model, folder / "base"), keys)


def aligned_model(folder, operator):
    """A tiny Llama in float64 with MoRA matrices that are not zero, its config, and its 4
    leading directions.
    """
    torch.manual_seed(0)
    model = tiny_model("llama")
    config = MoRAConfig(rank=3, operator=operator)
    leading = leading_of_base(config, loaded_base(model, folder), 4, ALONE)
    model = model.double()
    inject(model, config)
    for index, layer in enumerate(mora_layers(model).values()):
        layer.value.data = 0.02 * random(*layer.value.shape, seed=index)
    return model, config, leading


def mean_share(model, leading):
    """From dense deltas, differentiable in the MoRA matrices."""
    layer_shares = []
    for module, layer in mora_layers(model).items():
        directions = leading[module]
        delta = layer.spec.delta_weight(layer.value)
        inside = directions.left.double() @ delta @ directions.right.double().T
        floor = (FLOOR * directions.norm) ** 2
        layer_shares.append(inside.square().sum() / (delta.square().sum() + floor))
    return torch.stack(layer_shares).mean()


@pytest.mark.parametrize(
    "operator, checkpointing",
    [*((operator, False) for operator in EVERY), ("share", True)],
)
def test_the_loss_of_a_model_and_its_gradients(operator, checkpointing, tmp_path):
    """Two micro-batches before a step; then the same with the operators of the next
    cycle.
    """
    model, config, leading = aligned_model(tmp_path, operator)
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    batches = [tokens(2, seed=seed) for seed in (0, 1)]
    squares = [layer.value for layer in mora_layers(model).values()]
    for cycle in (0, 1):
        set_cycle(model, config, cycle)
        plain = [
            torch.autograd.grad(causal_loss(model, ids), squares) for ids in batches
        ]
        share = mean_share(model, leading)
        of_share = torch.autograd.grad(share, squares)
        if cycle == 0:
            alignment = Alignment(model, leading, weight=0.7)
        model.zero_grad()
        for ids in batches:
            with alignment.recording():
                loss = causal_loss(model, ids)
            ((loss + alignment.loss()) / 2).backward()
            assert_close(alignment.value, share.detach(), rtol=1e-8, atol=0)
        for square, first, second, aligned in zip(
            squares, *plain, of_share, strict=True
        ):
            expected = (first + second) / 2 - 0.7 * aligned
            assert_close(square.grad, expected, rtol=1e-7, atol=1e-10)


def test_it_is_silent_where_nothing_is_trained(tmp_path):
    model, _, leading = aligned_model(tmp_path, "share")
    alignment = Alignment(model, leading, weight=0.7)
    ids = tokens(2)
    with torch.no_grad(), alignment.recording():
        model.train()(input_ids=ids)
        assert not alignment._shares
    model.eval()(input_ids=ids)
    assert not alignment._shares
    model.train()(input_ids=ids)
    assert not alignment._shares, "nobody wants its loss"
    with pytest.raises(RunError, match="in training mode"):
        alignment.loss()


# -- whole runs ------------------------------------------------------------------------


ALIGNED = {"alignment_weight": 0.5, "alignment_rank": 4}
MERGING = "--operator rotate --merge_every 2 --restart_warmup_steps 1 --max_steps 6"


IN_PARTS = "--gradient_accumulation_steps 2 --gradient_checkpointing"


def shares(out):
    return [row["alignment"] for row in rows(out) if "alignment" in row]


def test_one_curve_for_any_ranks_and_accumulation(user, tmp_path):
    """4 sequences a step under ZeRO-3: 1 x 2 x 2, checkpointed, and 2 x 2; with merges, a
    resume and an export.
    """
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    run(1, research(user.flags(one, MERGING, IN_PARTS), tmp_path, **ALIGNED))
    run(2, research(user.flags(two, MERGING, "--save_steps 3"), tmp_path, **ALIGNED))
    first, second, third, *_ = shares(one)
    assert first == 0 == third
    assert second > 0, "squares of zeros begin each cycle"
    assert_close_runs(two, one)
    assert shares(two) == pytest.approx(shares(one), rel=1e-4)
    resume = (MERGING, "--resume_from_checkpoint", two / "checkpoints/step-000003")
    run(2, research(user.flags(again, *resume), tmp_path, **ALIGNED))
    assert [row for row in curve(two) if row["step"] > 3] == curve(again)
    export_merged(again, tmp_path / "merged", verify=True)
    lighter = {**ALIGNED, "alignment_weight": 0.25}
    argv = research(user.flags(tmp_path / "other", *resume), tmp_path, **lighter)
    assert "research.alignment_weight, alignment_rank" in refusal(argv, ranks=2)
