"""Every precision, ZeRO stage, operator, checkpointing and offload, with other parameters
trained too, over a merge.

In fp32 each run must follow one plain PyTorch process. In bf16 and fp16 a merge must change
nothing but what rounding does, leave nothing of the old MoRA matrices behind, and touch
nothing else that is trained.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers, set_cycle
from mora_ds.adapters.ops.mora import delta_weight
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.models.base import BaseCheckpoint, map_model
from mora_ds.remora.ledger import Ledger
from mora_ds.remora.merge import ReMoRA
from tests.helpers.engines import state_tensors
from tests.helpers.gloo import run_ranks
from tests.helpers.models import (
    causal_loss,
    enable_checkpointing,
    micro_step,
    tiny_model,
    tokens,
)
from tests.helpers.tables import parsed, rows

WORLD = 2
ROWS = 2
STEPS = 3
MERGE_AFTER = 2
LEARNING_RATE = 1e-2
CLIP = 0.5
PROBE = tokens(4, seed=99)


@dataclass(frozen=True)
class Case:
    """One run on `WORLD` ranks."""

    family: str = "llama"
    stage: int = 3
    dtype: str = "float32"
    accumulation: int = 1
    checkpointing: bool = False
    adapter: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    loss_scale_power: int = 12
    """fp16: the first loss scale is 2 to this."""

    def mora(self):
        return MoRAConfig(
            **{"rank": 4, "operator": "share", "r_hat_multiple": 1, **self.adapter}
        )

    def deepspeed(self):
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": CLIP,
            "zero_optimization": {
                "stage": self.stage,
                "stage3_param_persistence_threshold": 0,
                **self.zero,
            },
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": LEARNING_RATE,
                    "weight_decay": 0.0,
                    "torch_adam": True,
                },
            },
        }
        if self.dtype == "bfloat16":
            config["bf16"] = {"enabled": True}
        elif self.dtype == "float16":
            config["fp16"] = {
                "enabled": True,
                "initial_scale_power": self.loss_scale_power,
                "hysteresis": 1,
            }
        return config

    def model(self):
        model = tiny_model(self.family, dtype=getattr(torch, self.dtype))
        if self.checkpointing:
            enable_checkpointing(model)
        inject(model, self.mora())
        return model.train()


EXACT = """
checkpointing, truncate | {checkpointing: true, adapter: {operator: truncate}}
persistent matrices | {zero: {stage3_param_persistence_threshold: 1000000}, accumulation: 2}
activations, decouple | {adapter: {compute: activation, operator: decouple}, checkpointing: true}
weights, rotate | {adapter: {compute: weight, operator: rotate}, checkpointing: true}
tied embeddings, kept gathered | {tied: true, zero: {stage3_param_persistence_threshold: 1000000}}
tied embeddings, all at once | \
{tied: true, accumulation: 3, checkpointing: true, zero: {offload_optimizer: {device: cpu}}}
conv1d, tied | {tied: true, checkpointing: true, family: gpt2}
untied embeddings and head | {adapter: {operator: rotate, train_embeddings: true, train_head: true}}
stage 1 | {tied: true, stage: 1, accumulation: 2}
stage 2, offloaded | {tied: true, stage: 2, zero: {offload_optimizer: {device: cpu}}, checkpointing: true}
"""
ROUNDED = """
bfloat16, stage 3 | {dtype: bfloat16, checkpointing: true, accumulation: 2}
bfloat16, stage 3, kept gathered | {dtype: bfloat16, tied: true, zero: {stage3_param_persistence_threshold: 1000000}}
bfloat16, stage 2 | {dtype: bfloat16, tied: true, stage: 2, accumulation: 2}
bfloat16, stage 1 | {dtype: bfloat16, tied: true, stage: 1}
float16, stage 3 | {dtype: float16, tied: true, accumulation: 2}
float16, stage 3, offloaded | {dtype: float16, tied: true, zero: {offload_optimizer: {device: cpu}}}
float16, stage 2 | {dtype: float16, tied: true, stage: 2}
float16, stage 1 | {dtype: float16, tied: true, stage: 1, accumulation: 2}
"""
"""Each dtype under each stage."""
OVERFLOW = """
overflow, stage 3 | {dtype: float16, loss_scale_power: 24, tied: true, accumulation: 2}
overflow, stage 2 | {dtype: float16, loss_scale_power: 24, tied: true, stage: 2}
"""
TIED = {"family": "qwen2", "adapter": {"train_embeddings": True, "train_norms": True}}


def case_of(tied=False, **settings):
    """`tied`: a model whose embeddings are its head's weight, all of it trained."""
    return Case(**{**(TIED if tied else {}), **settings})


def cases_of(table):
    """{name: its case}. A row of the table has the name before the settings."""
    return {name: case_of(**parsed(settings)) for name, settings in rows(table)}


EXACT_CASES = cases_of(EXACT)
ROUNDED_CASES = cases_of(ROUNDED)
OVERFLOW_CASES = cases_of(OVERFLOW)


# -- one process, no DeepSpeed ---------------------------------------------------------


def plain_run(case):
    """The complete global batch at once, in fp32."""
    case = replace(case, dtype="float32", checkpointing=False)
    model = case.model()
    mora_matrices = {
        name: layer.mora_matrix for name, layer in mora_layers(model).items()
    }
    optimizer = torch.optim.AdamW(
        list(model.parameters()), lr=LEARNING_RATE, weight_decay=0.0
    )
    losses = []
    norms = []
    for step in range(STEPS):
        loss = causal_loss(model, batch(step, case.accumulation).flatten(0, 2))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step + 1 == MERGE_AFTER:
            for layer in mora_layers(model).values():
                delta = delta_weight(layer.spec, layer.mora_matrix.data)
                layer.weight += delta.T if layer.transposed else delta
                layer.mora_matrix.data.zero_()
                optimizer.state.pop(layer.mora_matrix)
            set_cycle(model, case.mora(), 1)
    other_parameters = others_of(model, mora_matrices)
    return {
        "losses": losses,
        "norms": norms,
        "mora_matrices": detached(mora_matrices),
        "others": detached(other_parameters),
    }


def batch(step, accumulation):
    """(accumulation, WORLD, ROWS, T)."""
    return tokens(accumulation * WORLD * ROWS, seed=step).view(
        accumulation, WORLD, ROWS, -1
    )


def others_of(model, mora_matrices):
    ids = {id(mora_matrix) for mora_matrix in mora_matrices.values()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in ids
    }


def detached(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


# -- several ranks ---------------------------------------------------------------------


def sharded_run(case, folder):
    model = case.model()
    engine, *_ = initialize(model=model, config=case.deepspeed())
    merger = new_merger(case, engine, folder)
    mora_matrices = {
        name: layer.mora_matrix for name, layer in mora_layers(model).items()
    }
    other_parameters = others_of(model, mora_matrices)
    result = {"losses": [], "norms": [], "skipped": [], "probes": []}
    for step in range(STEPS):
        result["losses"].append(train_step(engine, batch(step, case.accumulation)))
        if step == 0:
            result["start"] = largest(master_weights(engine, mora_matrices))
        result["norms"].append(zero.gradient_norm(engine))
        result["skipped"].append(getattr(engine.optimizer, "overflow", False))
        if step + 1 == MERGE_AFTER:
            result["probes"].append(probe(engine))
            weights_before = master_weights(engine, other_parameters)
            merger.merge(step + 1)
            result["left"] = largest(master_weights(engine, mora_matrices))
            result["state"] = {
                key: tensor.abs().max().item()
                for key, tensor in state_tensors(engine, 0)
            }
            result["others_kept"] = same(
                weights_before, master_weights(engine, other_parameters)
            )
            result["others_moved"] = others_state(engine, other_parameters)
            result["probes"].append(probe(engine))
        if step == MERGE_AFTER:
            result["first"] = largest(master_weights(engine, mora_matrices))
    result |= {
        "mora_matrices": master_weights(engine, mora_matrices),
        "others": master_weights(engine, other_parameters),
    }
    result["dtypes"] = {str(tensor.dtype) for tensor in frozen_buffers(model).values()}
    result["positions"] = {
        str(b.dtype) for name, b in model.named_buffers() if name.endswith("inv_freq")
    }
    engine.destroy()
    return result


def new_merger(case, engine, folder):
    """Merges onto the original on disk, which is always fp32."""
    base = BaseCheckpoint.open(folder.parent / case.family)
    if dist.get_rank() == 0:
        Ledger.create(folder, base.fingerprint())
    dist.barrier()
    keys = {f"{name}.weight": f"{name}.weight" for name in mora_layers(engine.module)}
    if case.family == "gpt2":  # its files leave the prefix out
        keys = map_model(base, engine.module, keys)
    return ReMoRA(engine, case.mora(), Ledger.open(folder), base, keys)


def train_step(engine, rows):
    """Global mean loss of a step over all micro-batches."""
    total = torch.zeros(())
    for micro_batch in rows:
        total += micro_step(engine, micro_batch[dist.get_rank()])
    dist.all_reduce(total)
    return total.item() / len(rows) / WORLD


@torch.no_grad()
def probe(engine):
    return causal_loss(engine, PROBE).item()


def master_weights(engine, parameters):
    return {
        name: zero.full_fp32(parameter).clone()
        for name, parameter in parameters.items()
    }


def largest(tensors):
    return max(tensor.abs().max().item() for tensor in tensors.values())


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def others_state(engine, parameters):
    """Whether the other group, if any, still has its moments on this rank."""
    if not parameters:
        return True
    return any(
        tensor.numel() > 1 and bool(tensor.abs().max() > 0)
        for _, tensor in state_tensors(engine, 1)
    )


def all_cases(cases, root):
    return {
        name: sharded_run(case, root / name.replace(" ", "-"))
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The result of each rank in each case."""
    root = tmp_path_factory.mktemp("precision")
    for family in ("llama", "qwen2", "gpt2"):
        tiny_model(family).save_pretrained(root / family)
    return run_ranks(
        WORLD, all_cases, {**EXACT_CASES, **ROUNDED_CASES, **OVERFLOW_CASES}, root
    )


# -- fp32 ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT_CASES)
def test_fp32_follows_one_process_across_a_merge(name, runs):
    expected = plain_run(EXACT_CASES[name])
    for result in (rank[name] for rank in runs):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert result["probes"][1] == pytest.approx(result["probes"][0], abs=1e-6)
        for group in ("mora_matrices", "others"):
            assert result[group].keys() == expected[group].keys()
            for key, tensor in expected[group].items():
                # Adam turns rounding of a gradient near zero into a step
                difference = result[group][key] - tensor
                assert difference.norm() <= 1e-3 * tensor.norm(), key
                assert difference.abs().max() <= 0.01 * LEARNING_RATE, key


# -- bf16 and fp16 ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUNDED_CASES)
def test_low_precision_stays_near_fp32(name, runs):
    expected = plain_run(ROUNDED_CASES[name])
    for result in (rank[name] for rank in runs):
        assert not any(result["skipped"])
        assert result["losses"] == pytest.approx(expected["losses"], abs=1e-2)
        assert result["norms"] == pytest.approx(expected["norms"], rel=0.05)
        assert result["dtypes"] == {f"torch.{ROUNDED_CASES[name].dtype}"}
        assert result["positions"] <= {"torch.float32"}, (
            "rotary frequencies must not be rounded"
        )


@pytest.mark.parametrize("name", [*EXACT_CASES, *ROUNDED_CASES])
def test_a_merge_leaves_nothing_behind_and_touches_nothing_else(name, runs):
    case = {**EXACT_CASES, **ROUNDED_CASES}[name]
    tolerance = {"float32": 1e-6, "bfloat16": 5e-3, "float16": 5e-4}[case.dtype]
    for result in (rank[name] for rank in runs):
        before, after = result["probes"]
        assert after == pytest.approx(before, abs=tolerance)
        assert result["left"] == 0.0
        assert result["state"].keys() >= {"exp_avg", "exp_avg_sq"}
        assert max(result["state"].values()) == 0.0
        assert result["start"] == pytest.approx(LEARNING_RATE, rel=0.02)
        # 2.94 x this with the old step count
        assert result["first"] == pytest.approx(LEARNING_RATE, rel=0.02)
        assert result["others_kept"]
    # A rank's share may be all zeros
    assert any(rank[name]["others_moved"] for rank in runs)


# -- overflow --------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERFLOW_CASES)
def test_a_skipped_step_can_be_followed_by_a_merge(name, runs):
    """The loss scale starts far too high: the steps before the merge are skipped, the MoRA
    matrices are still zero.
    """
    for result in (rank[name] for rank in runs):
        assert result["skipped"][:MERGE_AFTER] == [True] * MERGE_AFTER
        before, after = result["probes"]
        assert after == before
        assert result["left"] == 0.0
        assert all(
            torch.isfinite(mora_matrix).all()
            for mora_matrix in result["mora_matrices"].values()
        )
