"""The alignment loss is that of the dense delta, with its gradient, for any number of
processes and accumulation."""

import pytest
import torch
from torch.testing import assert_close

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers, set_cycle
from mora_ds.adapters.ops.index_tables import tables_of
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.spec import OperatorKind
from mora_ds.config.arguments import from_flat
from mora_ds.config.validate import validate
from mora_ds.deploy.export import export_merged
from mora_ds.models.base import write_own_base
from mora_ds.research.alignment import (
    OFFSET,
    Alignment,
    Leading,
    leading_of_base,
    share_of,
)
from mora_ds.research.subspace import SubspaceConfig, SubspaceSpec
from mora_ds.runtime.ranks import Ranks
from tests.helpers.errors import run_error, user_error
from tests.helpers.jobs import research, run, validation_errors_of
from tests.helpers.jobs import rows as rows_of
from tests.helpers.models import causal_loss, enable_checkpointing, tiny_model, tokens
from tests.helpers.operators import random, specs, specs_of_tables
from tests.helpers.resume import assert_close_runs, assert_same_run, stop_and_resume
from tests.helpers.tables import parsed, rows

ALONE = Ranks(0, 1, 0, None, timeout_s=60)


def share_by_hand(delta, leading):
    inside = leading.left.double() @ delta @ leading.right.double().T
    offset = (OFFSET * leading.norm.double()) ** 2
    return inside.square().sum() / (delta.square().sum() + offset)


def leading_of(weight, rank):
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return Leading(left[:, :rank].T, right[:rank], weight.norm())


def test_the_share_is_that_of_the_full_delta():
    """For every operator and shape, LoRA and subspaces; no delta is formed."""
    for spec in [*specs(), LoRASpec(13, 7, 3, 6.0), SubspaceSpec(13, 7, 5)]:
        weight = random(spec.d_out, spec.d_in, seed=5)
        value = random(*spec.adapter_weight_shape)
        leading = leading_of(weight, min(3, spec.d_in, spec.d_out))
        share = share_of(spec, value, leading)
        expected = share_by_hand(spec.delta_weight(value), leading)
        assert_close(share, expected, rtol=1e-8, atol=1e-12, msg=str(spec))
        assert 0 <= share <= 1


# -- on a model ------------------------------------------------------------------------

CONFIGS = {
    **{kind.value: MoRAConfig(rank=3, operator=kind.value) for kind in OperatorKind},
    "lora": LoRAConfig(rank=3),
    "subspace": SubspaceConfig(rank=3),
}


def aligned_model(folder, config):
    """A tiny Llama in fp64 with values that are not zero, and its 4 leading directions."""
    model = tiny_model("llama")
    base = write_own_base(model, folder / "base")
    keys = {name: name for name, _ in model.named_parameters()}
    inject(model, config)
    leading = leading_of_base(model, base, keys, 4, ALONE)
    for index, layer in enumerate(mora_layers(model).values()):
        if layer.fixed is not None:
            layer.fixed = layer.fixed_of(layer.weight.double())
        layer.adapter_weight.data = 0.02 * random(
            *layer.adapter_weight.shape, seed=index
        )
    return model.double(), leading


def mean_share(model, leading):
    """From dense deltas, differentiable in what is trained."""
    shares = [
        share_by_hand(
            layer.spec.delta_weight(layer.unshard(layer.adapter_weight)), leading[name]
        )
        for name, layer in mora_layers(model).items()
    ]
    return torch.stack(shares).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_a_model_and_its_gradients(name, checkpointing, tmp_path):
    """Two micro-batches before a step; then the same with the operators of the next
    cycle."""
    config = CONFIGS[name]
    model, leading = aligned_model(tmp_path, config)
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    batches = [tokens(2, seed=seed) for seed in (0, 1)]
    values = [layer.adapter_weight for layer in mora_layers(model).values()]
    alignment = Alignment(model, weight=0.0)
    alignment.leading = leading
    for cycle in (0, 1):
        set_cycle(model, config, cycle)
        share = mean_share(model, leading)
        of_share = torch.autograd.grad(share, values)
        gradients = {}
        for alignment.weight in (0.0, 0.7):
            model.zero_grad()
            for ids in batches:
                loss = causal_loss(model, ids)
                ((loss + alignment.loss()) / 2).backward()
            value = alignment.value.double()
            assert_close(value, share.detach(), rtol=1e-6, atol=0)
            gradients[alignment.weight] = [value.grad.clone() for value in values]
        for plain, both, aligned in zip(
            gradients[0.0], gradients[0.7], of_share, strict=True
        ):
            assert_close(both, plain - 0.7 * aligned, rtol=1e-6, atol=1e-9)


def test_it_keeps_the_tables_that_it_reads(tmp_path, monkeypatch):
    """On a GPU layers hold tables of another kind, those of kernels."""
    model, leading = aligned_model(tmp_path, CONFIGS["rotate"])
    alignment = Alignment(model.train(), weight=0.7)
    alignment.leading = leading
    specs = specs_of_tables(monkeypatch)
    for _ in range(2):
        causal_loss(model, tokens(2))
        for layer in mora_layers(model).values():
            layer._tables_in_use = None
        tables_of.cache_clear()  # as 64 other layers do
    assert len(specs) == len(leading)


def test_it_is_silent_where_nothing_is_trained(tmp_path):
    model, leading = aligned_model(tmp_path, CONFIGS["share"])
    alignment = Alignment(model, weight=0.7)
    alignment.leading = leading
    ids = tokens(2)
    with torch.no_grad():
        model.train()(input_ids=ids)
    model.eval()(input_ids=ids)
    with run_error("a forward pass in training mode"):
        alignment.loss()


def test_a_weight_that_has_too_few_singular_vectors_or_no_numbers(tmp_path):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[1, 2] = float("nan")
    base = write_own_base(model, tmp_path / "base")
    keys = {name: name for name, _ in model.named_parameters()}
    inject(model, MoRAConfig(rank=2))
    with user_error(r"layers\.0\.mlp\.up_proj\.weight: NaN and infinity"):
        leading_of_base(model, base, keys, 4, ALONE)
    with user_error(
        r"alignment_rank 17: model\.layers\.0\.self_attn\.k_proj has 16 singular"
    ):
        leading_of_base(model, base, keys, 17, ALONE)


# -- whole runs ------------------------------------------------------------------------

ALIGNED = {"alignment_weight": 0.5, "alignment_rank": 4}
MERGING = "--operator rotate --merge_every 2 --restart_warmup_steps 1 --max_steps 6"
IN_PARTS = "--gradient_accumulation_steps 2 --gradient_checkpointing"


def shares(out):
    return [row["alignment"] for row in rows_of(out) if "alignment" in row]


@pytest.mark.heavy(seconds=15)
def test_one_curve_for_any_ranks_and_accumulation(user, tmp_path):
    """4 sequences a step under ZeRO-3: 1 x 2 x 2, checkpointed, and 2 x 2; with merges,
    resumes to the bit and an export."""
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    run(1, research(user.flags(one, MERGING, IN_PARTS), tmp_path, **ALIGNED))
    run(2, research(user.flags(two, MERGING, "--save_steps 3"), tmp_path, **ALIGNED))
    first, second, third, *_ = shares(one)
    assert first == 0 == third, "matrices of zeros begin each cycle"
    assert second > 0
    assert_close_runs(two, one)
    assert shares(two) == pytest.approx(shares(one), rel=1e-3)
    flags = user.flags(again, MERGING, "--save_steps 3")
    stop_and_resume(2, research(flags, tmp_path, **ALIGNED), 3, 5)
    assert_same_run(again, two)
    assert shares(again) == shares(two)
    export_merged(again, tmp_path / "merged", verify=True)
    resume = (MERGING, "--resume_from_checkpoint", two / "checkpoints/step-000003")
    lighter = {**ALIGNED, "alignment_weight": 0.25}
    argv = research(user.flags(tmp_path / "other", *resume), tmp_path, **lighter)
    assert "research.alignment_weight" in validation_errors_of(argv, ranks=2)


WRONG = """
{adapter: full, research: {alignment_weight: 0.1}} | --adapter full does not support the alignment loss
{tensor_parallel_size: 2, research: {alignment_weight: 0.1}} | needs unsplit MoRA matrices
{research: {alignment_weight: -1}} | research.alignment_weight must be
{research: {alignment_weight: 0.1, alignment_rank: 0}} | research.alignment_rank must be
{target_modules: [experts], research: {alignment_weight: 0.1}} | research.alignment_weight is for linear layers
{train_files: ["a=x:1", "b=y:1"], research: {domain_adapters: true, alignment_weight: 0.1}} | aligns one update a layer
"""


@pytest.mark.parametrize("settings, message", rows(WRONG))
def test_settings_that_contradict_it(settings, message):
    given = {"model_name_or_path": "m", "train_files": ["x"], **parsed(settings)}
    with user_error(message):
        validate(from_flat(given))
