"""Shards made by hand: any range of any parameter is read from whichever ranks hold it, and
what is wrong is named.

Those that engines write, in several processes: tests/checkpoint/test_elastic.py.
"""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mora_ds.checkpoint import shard_table
from mora_ds.checkpoint.shard_table import INDEX_FILE, EngineShards, RankShard
from mora_ds.engine import shards as shard_module
from mora_ds.engine.shards import MASTER, Extent, Layout
from mora_ds.engine.zero import Flat, Span
from tests.helpers.errors import run_error, user_error

SHAPES = {"a": [3, 4], "b": [5], "c": [2, 2]}
LAYOUTS = [
    [[Extent("a", 0, 7, 1), Extent("b", 0, 2, 8)], [Extent("c", 0, 3, 0)]],
    [[Extent("b", 2, 3, 4), Extent("a", 7, 5, 8)], [Extent("c", 3, 1, 2)]],
]
"""Two flat tensors a rank, with padding before, between and after the extents."""
VALUES = {
    "a": torch.arange(12.0) + 100,
    "b": torch.arange(5.0) + 200,
    "c": torch.arange(4.0) + 300,
}
FLAT_NUMEL = 16


def flat_of(pieces, plus):
    """The values of a flat tensor, -1 where no parameter is."""
    flat = torch.full((FLAT_NUMEL,), -1.0)
    for piece in pieces:
        values = VALUES[piece.name][piece.start : piece.start + piece.numel]
        flat[piece.offset : piece.offset + piece.numel] = values + plus
    return flat


def contents(rank, step=3):
    """The tensors in a rank's file; `step` as it counts the steps of both flat tensors."""
    tensors = {}
    for number, pieces in enumerate(LAYOUTS[rank]):
        tensors |= {
            f"{number}.master": flat_of(pieces, 0),
            f"{number}.exp_avg": flat_of(pieces, 0.25).double(),
            f"{number}.exp_avg_sq": flat_of(pieces, 0.5),
            f"{number}.step": torch.as_tensor(step).clone(),
        }
    return tensors


def layout(**more):
    groups = [{"a": SHAPES["a"]}, {"b": SHAPES["b"], "c": SHAPES["c"]}]
    facts = {
        "world_size": 2,
        "stage": 1,
        "optimizer": "AdamW",
        "counters": {},
        "scaler": {"cur_scale": 4.0, "cur_iter": 3},
        "groups": groups,
    }
    return Layout(**{**facts, **more})


def shards_of(folder, common, shards, stride=1):
    """The shards of ranks with these extents."""
    of_all = [
        RankShard.of(common, rank, f"{rank}.st", flats, stride=stride)
        for rank, flats in enumerate(shards)
    ]
    return EngineShards.of(folder, common, of_all)


def write(folder, *files, **more):
    """The shards of both ranks and their table."""
    folder.mkdir(exist_ok=True)
    for rank, content in enumerate(files or (contents(0), contents(1))):
        save_file(content, folder / f"{rank}.st")
    shards_of(folder, layout(**more), LAYOUTS).write_table(folder / INDEX_FILE)


def test_any_range_is_read_from_the_ranks_that_hold_it(tmp_path):
    write(tmp_path)
    shards = EngineShards.open(tmp_path)
    assert shards.layout.shapes == {
        name: tuple(shape) for name, shape in SHAPES.items()
    }
    assert shards.files == ["0.st", "1.st"]
    assert str(shards.layout.scaler) == "{'cur_scale': 4.0, 'cur_iter': 3}", (
        "saved again it is the same file"
    )
    for name, values in VALUES.items():
        for key, plus, dtype in (
            (MASTER, 0.0, torch.float32),
            ("exp_avg", 0.25, torch.float64),
        ):
            for start in range(len(values)):
                for numel in range(len(values) - start + 1):
                    piece = shards.read(name, key, start, numel)
                    assert piece.dtype == dtype
                    assert (
                        piece.tolist()
                        == (values[start : start + numel] + plus).tolist()
                    )
                tail = shards.read(name, key, start)
                assert tail.tolist() == (values[start:] + plus).tolist()
        assert shards.full(name, MASTER).shape == tuple(SHAPES[name])
        assert shards.state(name) == (["exp_avg", "exp_avg_sq"], {"step": 3})


def one_flat_each(folder):
    """One rank's file with a flat tensor for each parameter; the first has stepped once,
    the others four times.
    """
    flats = [[Extent(name, 0, math.prod(shape), 0)] for name, shape in SHAPES.items()]
    tensors = {}
    for number, values in enumerate(VALUES.values()):
        tensors |= {
            f"{number}.master": values,
            f"{number}.exp_avg": values + 1,
            f"{number}.step": torch.tensor(4.0 if number else 1.0),
        }
    save_file(tensors, folder / "0.st")
    shards_of(folder, layout(world_size=1), [flats]).write_table(folder / INDEX_FILE)
    return EngineShards.open(folder)


def test_a_count_that_was_read_is_a_copy(tmp_path):
    shards = one_flat_each(tmp_path)
    first, again = (shards.state("b")[1]["step"] for _ in range(2))
    first += 1
    assert again == 4
    assert shards.state("b")[1]["step"] == 4


def test_an_optimizer_that_has_not_stepped_has_no_state(tmp_path):
    fresh = [
        {name: tensor for name, tensor in contents(rank).items() if "master" in name}
        for rank in range(2)
    ]
    write(tmp_path, *fresh)
    shards = EngineShards.open(tmp_path)
    assert shards.state("a") == ([], {})
    assert torch.equal(shards.read("a", MASTER), VALUES["a"])


def test_what_is_wrong_with_a_shard_is_named(tmp_path):
    def broken(remove="", **changes):
        """The second rank's file without the first flat tensor's `remove`, or with other
        values of it.
        """
        content = {
            **contents(1),
            **{f"0.{key}": value for key, value in changes.items()},
        }
        content.pop(f"0.{remove}", None)
        write(tmp_path, contents(0), content)
        return EngineShards.open(tmp_path)

    shards = broken("exp_avg")
    with user_error(r"1.st is incomplete: .* elements 8 to 13 of 0.exp_avg"):
        shards.read("a", "exp_avg")
    on_rank_0 = shards.read("a", "exp_avg", 0, 7)
    assert on_rank_0.tolist() == (VALUES["a"][:7] + 0.25).tolist()
    with user_error(
        r"1.st: a has \(\['exp_avg_sq'\], {'step': tensor\(3\)}\), another rank's shard"
    ):
        shards.state("a")
    with user_error(r"1.st is incomplete: .* of 0.master"):
        broken("master").read("b", MASTER)
    shards = broken(master=torch.zeros(12))
    with user_error(r"1.st is incomplete: .* elements 8 to 13 of 0.master"):
        shards.read("a", MASTER)
    assert shards.read("b", MASTER, 2, 3).tolist() == [0, 0, 0]
    shards = broken(step=torch.tensor(4))
    with user_error(
        r"1.st: a has .*{'step': tensor\(4\)}\), another rank's shard .*{'step': tensor\(3\)}"
    ):
        shards.state("a")
    assert shards.state("a", 0, 7)[1] == {"step": 3}
    assert shards.state("a", 7, 2)[1] == {"step": 4}
    write(tmp_path, groups=[SHAPES])
    with user_error(r"layouts.safetensors is damaged: .*index out of range"):
        restored(EngineShards.open(tmp_path), [])


# -- the table -----------------------------------------------------------------------------


def test_runs_are_the_extents_of_all_ranks():
    """Runs of parameters on following ranks, in equal parts except for the first and
    the last."""
    random.seed(0)
    for world in range(1, 41):
        ranks = [[[]] for _ in range(world)]
        rows = []
        for number, name in enumerate("ab"):
            cuts = range(random.randint(0, 99), 99, random.randint(1, 99))
            ends = itertools.pairwise(sorted({0, *cuts, 99}))
            for place, (start, end) in enumerate(ends, number):
                rank = place % world
                ranks[rank][0].append(Extent(name, start, end - start, 0))
                rows.append([number, start, end - start, rank, 0, 0, 1, 1])
        common = layout(world_size=world, groups=[{"a": [99], "b": [99]}])
        shards = shards_of(None, common, ranks)
        shards._check_complete()
        plain = EngineShards(None, common, shards.files, np.array(rows))
        for start, end in itertools.combinations(range(100), 2):
            pieces = shards._pieces("b", start, end - start)
            assert list(pieces) == list(plain._pieces("b", start, end - start))


def test_the_table_of_thousands_of_ranks_is_small():
    ranks = [[[Extent("a", 16 * rank, 16, 0)]] for rank in range(4096)]
    common = layout(world_size=4096, groups=[{"a": [65536]}])
    shards = shards_of(None, common, ranks)
    assert shards.runs.tolist() == [[0, 0, 16, 0, 0, 0, 1, 4096]]
    assert len(RankShard.of(common, 4095, "", ranks[-1]).origins) < 100


def test_what_a_rank_sends_is_not_unpacked_beyond_its_limit(monkeypatch):
    monkeypatch.setattr(shard_table, "MAX_ORIGINS", 64)
    two_extents, one_extent = LAYOUTS[0]
    RankShard.of(layout(), 0, "file", [one_extent]).run(1)
    with run_error("file is said to have more than 1 extents"):
        RankShard.of(layout(), 0, "file", [two_extents]).run(1)


def test_a_run_passes_over_the_ranks_of_other_slices():
    """Tensor-parallel ranks 0 and 2 share the first slice, 1 and 3 the second."""
    slices = [[[Extent("a", start, 2, 5)]] for start in (0, 4, 2, 6)]
    common = layout(world_size=4, groups=[{"a": [8]}])
    shards = shards_of(None, common, slices, stride=2)
    assert len(shards.runs) == 2
    assert [rank for rank, *_ in shards._pieces("a", 0, None)] == [0, 2, 1, 3]


RUNS = [[0, 0, 4, 0, 0, 0, 1, 2], [0, 8, 2, 2, 0, 0, 1, 1]]
"""Extents of one parameter with 10 elements, on three ranks."""
NO_RUNS = f"""
1 0 4 0 0 0 1 2
-1 0 4 0 0 0 1 2
0 1 4 0 0 0 1 2
0 -3 4 0 0 0 1 2
0 0 0 0 0 0 1 2
0 0 {2**62} 0 0 0 1 2
0 0 5 0 0 0 1 2
0 0 4 -1 0 0 1 2
0 0 4 2 0 0 1 2
0 0 4 0 -1 0 1 2
0 0 4 0 0 -1 1 2
0 0 4 0 0 0 0 2
0 0 4 0 0 0 -1 2
0 0 4 0 0 0 {2**62} 2
0 0 4 0 0 0 1 1
0 0 -4 0 0 0 1 -2
0 0 4 0 0 0 1 {2**62 + 2}
0 8 2 2 0 0 1 1
"""
"""Rows that replace the first one: beyond a parameter or a rank, with a hole, or
twice."""


def opened(folder, rows):
    common = layout(world_size=3, groups=[{"a": [10]}])
    shards = EngineShards(folder, common, ["0", "1", "2"], np.array(rows))
    shards.write_table(folder / INDEX_FILE)
    return EngineShards.open(folder)


@pytest.mark.parametrize("line", NO_RUNS.strip().split("\n"))
def test_a_table_that_no_ranks_have_written(tmp_path, line):
    assert opened(tmp_path, RUNS).runs.tolist() == RUNS
    with user_error("do not hold all of a"):
        opened(tmp_path, [list(map(int, line.split())), RUNS[1]])


def test_ranks_with_other_learning_rates_have_another_layout():
    digests = {
        RankShard.of(layout(), 0, "0.st", [], [{"lr": rate}]).layout
        for rate in (0.1, 0.2, 0.1)
    }
    assert len(digests) == 2


# -- restoring -------------------------------------------------------------------------


def restored(shards, spans, device="cpu", /, **state):
    """A flat tensor of ones, set from the shards; counts that are tensors, on `device`."""
    parameters = {
        name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()
    }
    listed = [Span(parameters[name], *numbers) for name, *numbers in spans]
    flat = Flat(1, torch.ones(9), state, listed, listed)
    known = {
        id(value): shard_module._Parameter(name, tuple(SHAPES[name]))
        for name, value in parameters.items()
    }
    shard_module._restore_flat(flat, known, shards, device)
    return flat


def test_a_flat_tensor_is_set_with_zeros_where_no_parameter_is(tmp_path):
    write(tmp_path)
    stale = {"momentum": torch.ones(9), "exp_avg": torch.ones(9)}
    spans = [("a", 6, 2, 1), ("b", 0, 0, 3), ("b", 1, 3, 4)]
    flat = restored(EngineShards.open(tmp_path), spans, **stale)
    expected = torch.tensor([0.0, 106, 107, 0, 201, 202, 203, 0, 0])
    used = expected > 0
    assert torch.equal(flat.master, expected)
    assert flat.state["exp_avg"] is stale["exp_avg"]
    assert torch.equal(flat.state["exp_avg"], expected + 0.25 * used)
    assert torch.equal(flat.state["exp_avg_sq"], expected + 0.5 * used)
    assert flat.state["exp_avg_sq"].dtype == torch.float32
    assert "momentum" not in flat.state
    assert list(flat.state)[-2:] == ["step", "exp_avg_sq"]
    assert flat.state["step"] == 3
    fresh = restored(EngineShards.open(tmp_path), [("b", 0, 5, 0)])
    assert fresh.state["exp_avg"].dtype == torch.float64
    assert list(fresh.state) == ["step", "exp_avg", "exp_avg_sq"]


def test_padding_alone_has_the_state_of_its_group(tmp_path):
    """A rank may hold nothing of a group; its optimizer steps on zeros, as many times as
    the others.
    """
    flat = restored(one_flat_each(tmp_path), [])
    assert not flat.master.any()
    assert flat.state["step"] == 4
    assert flat.state["exp_avg"].shape == flat.master.shape
    assert not flat.state["exp_avg"].any()


def test_a_count_keeps_its_kind(tmp_path):
    write(tmp_path, contents(0, torch.tensor(3.0)), contents(1, torch.tensor(3.0)))
    shards = EngineShards.open(tmp_path)
    spans = [("b", 0, 5, 0)]
    assert isinstance(
        restored(shards, spans, step=torch.tensor(0.0)).state["step"], Tensor
    )
    for device in ("cpu", "meta"):
        assert restored(shards, spans, device).state["step"].device.type == device


def test_parameters_with_different_states_are_not_one_tensor(tmp_path):
    write(
        tmp_path, *({**contents(rank), "1.step": torch.tensor(9)} for rank in range(2))
    )
    spans = [("a", 0, 4, 0), ("b", 0, 1, 4), ("c", 0, 4, 5)]
    with user_error("a and c are one tensor here, with different state there"):
        restored(EngineShards.open(tmp_path), spans)
