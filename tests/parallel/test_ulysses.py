"""Split rows, attended by documents, give what complete rows give densely: s = 2, 4 and 2 x
2 under ZeRO-3 follow one plain PyTorch process."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from mora_ds.adapters.inject import frozen_buffers, mora_layers
from mora_ds.adapters.ops.mora import delta_weight
from mora_ds.common.tensor_files import tensor_checksum
from mora_ds.data import IGNORED
from mora_ds.data.documents import Documents
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.models.attention import use_document_attention
from mora_ds.models.loss import token_nll
from mora_ds.parallel.ulysses import bind_sequence_parallel
from mora_ds.train.preflight import check_split
from tests.helpers.engines import ds_config, plain_steps, trained_values
from tests.helpers.gloo import run_ranks
from tests.helpers.models import FAMILIES, adapted_model, tokens
from tests.helpers.pairwise import pairwise_cases

ROWS = 4
ACCUMULATION = 2
LENGTH = 24
STEPS = 3
"""Rows a micro-batch over all replicas, micro-batches, tokens (twice the sliding window of
the tiny models), steps.
"""
LEARNING_RATE = 2e-3
"""Low: where queries and keys are normed, larger steps blow rounding up."""
EVERYTHING = {"train_embeddings": True, "train_norms": True, "train_head": True}


@dataclass(frozen=True)
class Case:
    """A run to be repeated in parts."""

    family: str = "llama"
    operator: str = "share"
    documents: bool = True
    checkpointing: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)


def model_of(case):
    return adapted_model(
        case.family,
        case.checkpointing,
        case.model,
        operator=case.operator,
        **case.adapter,
    )


def batch_of(case, step):
    """The global batch: documents that end anywhere, over boundaries between ranks too; a
    row without an end; padding. Every rank draws all of it."""
    rows = ROWS * ACCUMULATION
    ids = tokens(rows, LENGTH + 1, seed=step)
    labels = ids[:, 1:].clone()
    positions = torch.arange(LENGTH).expand(rows, -1).clone()
    for row in range(rows) if case.documents else ():
        generator = torch.Generator().manual_seed(row)
        begins = torch.randint(1, LENGTH, (row % 4,), generator=generator)
        for begin in sorted(begins.tolist()):
            positions[row, begin:] -= positions[row, begin].item()
            labels[row, begin - 1] = IGNORED
    labels[-1, LENGTH // 3 :] = IGNORED
    return {"input_ids": ids[:, :-1], "labels": labels, "position_ids": positions}


def plain_run(case):
    """One process, no DeepSpeed, complete rows."""
    model = model_of(case)

    def losses_of(step):
        batch = batch_of(case, step)
        return [token_nll(model, batch) / (batch["labels"] != IGNORED).sum()]

    results = plain_steps(model, losses_of, STEPS, LEARNING_RATE)
    add_deltas(model, lambda mora_matrix: mora_matrix.data)
    results["base"] = {
        name: tensor.clone() for name, tensor in frozen_buffers(model).items()
    }
    return results


def split_run(case, size):
    """The same on this rank of several, `size` of which share each row."""
    world = dist.get_world_size()
    replicas = dist.get_world_size() // size
    replica = dist.get_rank() // size
    micro = ROWS // replicas
    model = model_of(case)
    use_document_attention(model)
    sequence = bind_sequence_parallel(model, size)
    config = ds_config(3, micro, ACCUMULATION)
    config["optimizer"]["params"]["lr"] = LEARNING_RATE
    engine, *_ = initialize(model=model, config=config)
    check_split(engine, model, sequence, case.documents)
    results = {"losses": [], "norms": []}
    for step in range(STEPS):
        batch = batch_of(case, step)
        total = torch.zeros((), dtype=torch.float64)
        predicted = int((batch["labels"] != IGNORED).sum())
        for index in range(ACCUMULATION):
            first = (index * replicas + replica) * micro
            rows = {
                name: tensor[first : first + micro] for name, tensor in batch.items()
            }
            if index == 0:  # else attention reads them from the positions
                rows["documents"] = Documents.of(rows["position_ids"])
            local_batch = sequence.split(rows)
            assert local_batch["input_ids"].shape == (micro, LENGTH // size)
            nll = token_nll(engine, local_batch)
            engine.backward(nll * ACCUMULATION * world / predicted)
            if step == 0 and index == ACCUMULATION - 1:
                results["gradients"] = {
                    name: safe_get_full_grad(p).clone()
                    for name, p in model.named_parameters()
                }
            engine.step()
            total += nll.detach()
        dist.all_reduce(total)
        results["losses"].append(total.item() / predicted)
        results["norms"].append(zero.gradient_norm(engine))
    results["values"] = trained_values(engine)
    add_deltas(model, lambda mora_matrix: zero.full_fp32(mora_matrix))
    base = frozen_buffers(model)
    results["checksums"] = {
        name: tensor_checksum(tensor) for name, tensor in base.items()
    }
    results["base"] = {}
    if dist.get_rank() == 0:
        results["base"] = {name: tensor.clone() for name, tensor in base.items()}
    return results


def add_deltas(model, unsharded):
    for layer in mora_layers(model).values():
        delta = delta_weight(layer.spec, unsharded(layer.mora_matrix))
        # Processes may share it
        layer.weight = layer.weight + (delta.T if layer.transposed else delta)


def split_runs(cases, size):
    return [split_run(case, size) for case in cases]


def assert_equal_runs(cases, ranks, size):
    results = run_ranks(
        ranks, split_runs, cases, size, timeout_s=max(240, 40 * len(cases))
    )
    for index, case in enumerate(cases):
        expected = plain_run(case)
        for actual in (result[index] for result in results):
            assert actual["checksums"] == results[0][index]["checksums"], case
            assert_equal_run(actual, expected, case)


def assert_equal_run(results, expected, case):
    assert results["losses"] == pytest.approx(expected["losses"], rel=1e-6), case
    assert results["norms"] == pytest.approx(expected["norms"], rel=1e-5), case
    for what, tolerance in (("gradients", 1e-5), ("values", 2e-5), ("base", 1e-5)):
        for name, tensor in results[what].items():
            error = (tensor - expected[what][name]).abs().max()
            scale = expected[what][name].abs().max()
            assert error <= tolerance * scale, (what, name, error, scale, case)


@pytest.mark.parametrize(
    "ranks, size, case",
    [
        (4, 4, Case("qwen2", "rotate", checkpointing=True)),
        (4, 2, Case("qwen3", "share", adapter=EVERYTHING)),
    ],
    ids=["s4", "s2 x dp2"],
)
def test_split_rows_equal_unsplit_rows(ranks, size, case):
    """Two ranks that share rows are tested by the heavy tests and
    test_ulysses_run.py."""
    assert_equal_runs([case], ranks, size)


GROUPS = [(2, 2), (4, 4), (4, 2)]
"""(ranks, ranks that share a row)"""
EVERY_TWO = pairwise_cases(
    {
        "family": list(FAMILIES),
        "group": GROUPS,
        "operator": ["share", "rotate", "decouple", "truncate"],
        "documents": [True, False],
        "checkpointing": [False, True],
        "adapter": [{}, EVERYTHING],
    }
)


@pytest.mark.heavy
@pytest.mark.parametrize("group", GROUPS)
def test_every_two_of_family_operator_and_the_rest(group):
    chosen = [dict(case) for case in EVERY_TWO if case["group"] == group]
    for case in chosen:
        del case["group"]
    assert_equal_runs([Case(**case) for case in chosen], *group)


@pytest.mark.heavy
@pytest.mark.parametrize("size", [2, 4])
def test_one_key_value_head(size):
    assert_equal_runs([Case("llama", model={"num_key_value_heads": 1})], size, size)
