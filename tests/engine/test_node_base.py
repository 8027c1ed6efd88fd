"""The processes of a node share one frozen base, which every merge leaves as if each had
merged alone.
"""

import os
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import frozen_buffers, inject, mora_layers
from mora_ds.common.errors import RunError
from mora_ds.common.tensor_files import COMPUTE_DTYPES
from mora_ds.engine.initialize import initialize
from mora_ds.engine.node_base import NodeBase, node_base_of
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.load import load_base
from mora_ds.remora.merge import gather_norms, layers_to_write
from mora_ds.runtime import node_memory
from mora_ds.runtime.node_memory import SharedMemory, free_bytes
from mora_ds.runtime.ranks import Ranks, balanced
from mora_ds.train.run import Run
from tests.helpers.engines import CountedBelow, ds_config, half_precision, rewrite
from tests.helpers.errors import run_error
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import refused, run
from tests.helpers.kills import STEPS
from tests.helpers.mappings import Mappings
from tests.helpers.models import micro_step, model_with_mora, tiny_model, tokens
from tests.helpers.outcome import assert_same_outcome
from tests.helpers.pool import run_pooled
from tests.helpers.resume import assert_same_tensors, interrupted_job
from tests.helpers.tables import heavy, parsed

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="needs /proc"
)

MERGES = 2
CASES = parsed("""
fp32: {}
bf16 of a fp32 file: {dtype: bfloat16}
int8: {adapter: {base_bits: 8}}
Conv1D, tied: {family: gpt2}
Conv1D, int8, bf16: {family: gpt2, adapter: {base_bits: 8}, dtype: bfloat16}
rotate: {adapter: {operator: rotate}}
truncate: {adapter: {operator: truncate}}
tied: {family: qwen2, dtype: bfloat16}
experts: {family: mixtral, adapter: {target_modules: [all-linear, experts]}}
""")
FEW = ("fp32", "Conv1D, int8, bf16")


def merged(folder, choice, case):
    """A run of one process of several, with merges after its steps: its frozen tensors and
    what was sent.
    """
    settings = CASES[case]
    family = settings.get("family", "llama")
    dtype = COMPUTE_DTYPES[settings.get("dtype", "float32")]
    rank = dist.get_rank()
    world = dist.get_world_size()
    base = folder / case / "base"
    if rank == 0 and not base.exists():
        tiny_model(family).save_pretrained(base)
    dist.barrier()
    loaded = load_base(base, base / "own", Ranks.current(), dtype, None)
    adapter = {"operator": "share", **settings.get("adapter", {})}
    config = MoRAConfig(rank=4, compute="weight", **adapter)
    inject(loaded.model, config, lambda name: loaded.base.read(loaded.keys[name]))
    zero3 = ds_config(3, 2, 1, **half_precision(dtype))
    alone = mock.patch.object(
        SharedMemory, "create", side_effect=OSError("no memory to share")
    )
    with alone if choice == "private" else nullcontext():
        engine, *_ = initialize(model=loaded.model, config=zero3)
    run = Run(
        engine, base=base, folder=folder / case / f"{choice}-{world}", overwrite=True
    )
    node = node_base_of(loaded.model)
    below = {}
    counter = CollectiveCounter(
        [*frozen_buffers(loaded.model).values(), *node.slots.values()]
    )
    reports = []
    losses = []
    for step in range(MERGES + 1):
        ids = tokens(2 * world, seed=step)[2 * rank :][:2]
        losses.append(micro_step(engine, ids).item())
        if step < MERGES:
            with counter.counting(), CountedBelow(below):
                reports.append(vars(run.merge(step + 1)))
    mappings = Mappings.read()
    frozen = frozen_buffers(loaded.model)
    return {
        "frozen": {name: tensor.clone() for name, tensor in frozen.items()},
        "tied": len({tensor.data_ptr() for tensor in frozen.values()}),
        "reports": reports,
        "losses": losses,
        "places": {
            name: mappings.place_of(layer.weight)
            for name, layer in mora_layers(loaded.model).items()
        },
        "base_bytes": counter.base_bytes,
        "sent": sum(below.values()),
    }


def private_and_shared(folder, cases):
    return {
        case: {
            choice: merged(Path(folder), choice, case) for choice in ("private", "auto")
        }
        for case in cases
    }


@pytest.mark.parametrize(
    "world, cases",
    [
        (2, FEW),
        heavy(2, tuple(CASES)),
        heavy(3, (*FEW, "experts")),
    ],
)
def test_a_shared_merge_is_that_of_each_process_alone(tmp_path, world, cases):
    ranks = run_ranks(world, private_and_shared, str(tmp_path), cases)
    for case in cases:
        alone = ranks[0][case]["private"]
        assert set(alone["places"].values()) == {None}
        shared = [rank[case]["auto"] for rank in ranks]
        assert len({str(result["places"]) for result in shared}) == 1, (
            "every process reads the same pages"
        )
        assert None not in shared[0]["places"].values()
        for rank, result in zip(ranks, shared, strict=True):
            assert result["reports"] == alone["reports"]
            assert result["losses"] == rank[case]["private"]["losses"]
            assert result["tied"] == alone["tied"]
            assert_same_tensors(result["frozen"], alone["frozen"], case)
            assert result["base_bytes"] == 0
            # Norms of the layers, and checks
            small = 64 * len(result["places"]) * MERGES + 4096
            assert result["sent"] - rank[case]["private"]["sent"] < small


def on_two_nodes(folder):
    """Rank 0 is a node, ranks 1 and 2 are another one."""
    os.environ["LOCAL_RANK"] = str(max(0, dist.get_rank() - 1))
    return private_and_shared(folder, ["fp32"])["fp32"]


@pytest.mark.heavy
def test_nodes_of_one_and_of_two_processes(tmp_path):
    ranks = run_ranks(3, on_two_nodes, str(tmp_path))
    assert ranks[1]["auto"]["places"] == ranks[2]["auto"]["places"]
    assert None not in ranks[1]["auto"]["places"].values()
    for rank in ranks:
        assert rank["auto"]["reports"] == rank["private"]["reports"]
        assert_same_tensors(rank["auto"]["frozen"], rank["private"]["frozen"])


def faults():
    """An error of one process is raised on all."""
    model = model_with_mora()
    initialize(model=model, config=ds_config(3, 2, 1))
    is_odd = dist.get_rank() == 1

    def work(name, _):
        if is_odd:
            raise RunError(f"no memory for {name}")

    with run_error("rank 1: no memory for"):
        rewrite(model, work)
    if is_odd:
        layer = next(iter(mora_layers(model).values()))
        layer.weight = layer.weight.clone()
    with run_error("replaced after the start"):
        rewrite(model, lambda name, _: None)


def test_an_error_of_one_process_is_one_of_all():
    run_pooled(2, faults)


def interrupted_with_private_bases(argv, step):
    """A run on processes that cannot share memory, which stops dead after `step`."""
    with mock.patch.object(
        SharedMemory, "create", side_effect=OSError("no memory to share")
    ):
        interrupted_job(argv, step)


@pytest.mark.heavy
def test_a_run_with_private_bases_is_resumed_with_a_shared_one(user, tmp_path, out):
    texts = ("--eval_files", f"short={user.other}")
    flags = user.flags(out, STEPS, *texts, "--resume_from_checkpoint auto")
    reference = tmp_path / "reference"
    run(2, [*flags, "--output_dir", str(reference)])
    run_ranks(2, interrupted_with_private_bases, flags, 4)
    run(2, flags)
    assert_same_outcome(out, reference)


# -- one process -----------------------------------------------------------------------


def test_a_process_alone_owns_all_layers_and_several_deal_them_out():
    sizes = {"a": 5, "b": 1, "c": 4, "d": 1}
    assert balanced(sizes, 2) == [["a", "d"], ["c", "b"]]
    assert balanced(sizes, 5)[4] == []
    layers = mora_layers(model_with_mora())
    assert layers_to_write(NodeBase(), layers) == list(layers)


def test_a_layer_that_is_not_shared_is_written_by_each_process_and_counts_once():
    """Example: a head that is adapted on a GPU, with the base in host memory."""
    model = model_with_mora(target_modules=("q_proj", "lm_head"))
    layers = mora_layers(model)
    slots = {
        f"{name}.weight": layer.weight
        for name, layer in layers.items()
        if name != "lm_head"
    }
    total = torch.zeros(len(layers), 4)
    written = []
    for rank in range(4):  # of two nodes
        ranks = mock.Mock(rank=rank, is_rank0=rank == 0, sum=lambda table: table)
        base = NodeBase(ranks, (0, 1) if rank < 2 else (2, 3), slots)
        names = layers_to_write(base, layers)
        written += names
        norms = {
            name: 4 * [torch.tensor(float(1 + list(layers).index(name)))]
            for name in names
        }
        total += gather_norms(base, norms, list(layers))
    assert sorted(written) == sorted([*layers, "lm_head"] * 2)
    assert total.tolist() == [[number] * 4 for number in range(1, 1 + len(layers))]


def named_memory():
    """But for semaphores, which other processes may make meanwhile."""
    names = {path.name for path in Path("/dev/shm").glob("*")}
    return {name for name in names if not name.startswith("sem.")}


def test_memory_has_no_name_and_ends_with_its_last_mapping():
    before = named_memory()
    offer = SharedMemory.create(1 << 16, "layout")
    descriptors = len(os.listdir("/proc/self/fd"))
    one = offer.map("layout")
    twin = offer.map("layout")
    with run_error("different layouts"):
        offer.map("another")
    offer.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1
    first, second = (
        torch.empty(0, dtype=torch.uint8).set_(storage) for storage in (one, twin)
    )
    first[7] = 3
    assert second[7] == 3
    assert Mappings.read().place_of(first) == Mappings.read().place_of(second)
    assert named_memory() <= before
    with run_error("cannot be mapped"):
        offer.map("layout")


def without_memory(argv):
    """The error of a run on a node that is nearly full."""
    node_memory.free_bytes = lambda: 1000
    return refused(argv)


def test_too_little_memory_is_named_at_the_start(user, out):
    flags = user.flags(out, STEPS)
    ((kind, message),) = set(run_ranks(2, without_memory, flags))
    assert kind == "UserError"
    assert "the base that the processes of this node share takes 0.000 GB" in message
    assert "--base_bits 8" in message


def test_limits_of_a_container_are_read(tmp_path, monkeypatch):
    group = tmp_path / "job"
    group.mkdir()
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("4000000\n")
    (group / "memory.stat").write_text(
        "anon 3500000\ninactive_file 300000\nactive_file 200000\n"
    )
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(node_memory, "cgroup_folders", lambda: [group, tmp_path])
    assert free_bytes() == 1_500_000
