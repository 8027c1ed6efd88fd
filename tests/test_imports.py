"""The house: which room stands on which floor, read from the imports. They go downward only.

A new room gets a floor here: one above the highest room it imports. Nothing else in this file should have to change.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import mora_ds

ROOT = Path(__file__).resolve().parents[1]

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        *("errors", "version", "ds_config_keys", "lanes", "tables", "processes", "status", "zero_trace"),
        *("capped_attention", "zero", "muon", "collective_counter"),
    ),
    (
        *("operator_spec", "compiling", "lora", "schedules", "stall", "files", "ranks", "flags", "ds_optimizer"),
        *("ds_tensor_parallel", "stopping", "topology", "sequence_parallel", "restart", "background", "forgetting"),
        *("trials", "new_rows", "memory_meter", "eight_bits", "target_sizes", "singular_vectors", "domain_names"),
        *("checks",),
    ),
    (
        *("wiring", "data", "cli", "pulse", "ds_config", "tensor_files", "metrics", "run_folder", "followers"),
        *("checkpoint_care", "schedule_text", "data_arguments", "collectives", "loop_settings", "subspace"),
    ),
    (
        *("operators", "base", "export_check", "checkpoint_folder", "training_arguments", "shards", "chunked_loss"),
        *("mixture_settings", "source_losses"),
    ),
    (
        *("model", "model_folder", "losses", "flat_tensors", "compute", "updates", "resets", "windows"),
        *("run_sources", "domain_squares", "weight_analysis", "base_svd"),
    ),
    (
        *("replicas", "deltas", "config", "layer", "spectrum", "vocabulary_rows", "partitions", "sequence_checks"),
        *("block_windows", "alignment_terms"),
    ),
    (
        *("tensor_plan", "adapter_arguments", "ledger", "checkpoint", "matching", "targets", "domain_layer"),
        *("stall_watch", "bank_layer"),
    ),
    (
        *("arguments", "injection", "adapter_files", "ledger_table", "tensor_inputs", "layer_merge", "target_checks"),
        *("domain_settings", "row_checks", "vector_checks", "run_vectors"),
    ),
    (
        *("tensor_parallel", "remora", "model_card", "ledger_tools", "universal", "portable", "run_data"),
        *("verification", "costs", "gradient_probe", "alignment", "data_checks", "parallel_checks"),
    ),
    (
        *("validation", "engine", "saving", "export", "trainer", "compact", "spectrum_report", "evaluation"),
        *("plan_step", "first_squares", "bank_files"),
    ),
    ("run", "plan_memory", "plan_time", "run_targets", "weight_report", "bank"),
    ("jobs", "plan", "bank_scores"),
    ("plan_report",),
    ("dry_run",),
    ("pretrain",),
    ("full_rank",),
    ("demo",),
)

DATA_FLOORS: tuple[tuple[str, ...], ...] = (
    ("parallel", "pieces", "readers", "embedded", "shares", "duplicates", "scripts"),
    ("held_out", "tokenizer", "prepared"),
    ("corpus", "vocabulary", "encoder"),
    ("inspection", "hub_stream"),
    ("cache",),
    ("packing", "split_writer"),
    ("mixture", "stream", "preparation"),
    ("stream_blocks",),
)
"""Within the wing `data`; of the house it sees no more than `DATA_SEES`."""

DATA_SEES = {"errors", "files"}

DEEPSPEED = {
    *("zero", "collective_counter", "muon", "topology", "flat_tensors", "partitions", "sequence_parallel"),
    *("engine", "saving", "jobs", "dry_run"),
}
"""Rooms that may import deepspeed: internals in the first line, its public functions in the other."""

DISTRIBUTED = {
    *("ranks", "pulse", "background", "engine", "checkpoint", "followers", "flat_tensors", "partitions", "remora"),
    *("saving", "trainer", "sequence_parallel", "sequence_checks", "replicas", "stall_watch"),
}
"""Rooms that may import torch.distributed."""

STANDARD_LIBRARY_ONLY = {
    *("errors", "version", "schedules", "stall", "schedule_text", "ds_config_keys", "ds_optimizer", "ds_config"),
    *("ds_tensor_parallel", "files", "cli", "stopping", "processes", "trials", "target_sizes"),
}
WITHOUT_DEEPSPEED = (
    "operators", "windows", "layer", "tensor_plan", "costs", "config", "injection", "data", "ledger", "export",
    "shards", "checkpoint_folder", "verification", "universal", "portable", "arguments", "validation", "evaluation",
    "vocabulary_rows", "bank_scores",
)  # fmt: skip
"""Rooms that must not need DeepSpeed, not even through another room."""


def room_of(module: str) -> str:
    """mora_ds.x -> x, mora_ds.data.y -> data.y."""
    return module.removeprefix("mora_ds.")


def modules() -> dict[str, Path]:
    """Room -> file; a wing stands under its own name."""
    found = {}
    for path in sorted((ROOT / "mora_ds").rglob("*.py")):
        parts = path.relative_to(ROOT / "mora_ds").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, also within functions; not what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in _running(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative imports hide the floor"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _running(child)


MODULES = modules()
IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def rooms_imported(name: str) -> set[str]:
    """Rooms that a room imports: `from mora_ds.files import x` and `from mora_ds import files` alike."""
    found = set()
    for imported in IMPORTS[name]:
        if not imported.startswith("mora_ds."):
            continue
        parts = room_of(imported).split(".")
        longest = next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in MODULES), None)
        assert longest, f"{MODULES[name]} imports {imported}, which is no room"
        found.add(longest)
    return found - {name}


def libraries(name: str) -> set[str]:
    return {imported.split(".")[0] for imported in IMPORTS[name]} - {"mora_ds"} - set(sys.stdlib_module_names)


def everything_below(name: str) -> set[str]:
    reached, waiting = set(), [name]
    while waiting:
        room = waiting.pop()
        if room not in reached:
            reached.add(room)
            waiting += rooms_imported(room)
    return reached


def floor_of(room: str) -> int:
    """Of the house; every room of a wing is on the wing's floor."""
    wing = room.split(".")[0]
    floors = [floor for floor, rooms in enumerate(FLOORS) if wing in rooms]
    assert floors, f"{room} has no floor yet: give it one in tests/test_imports.py"
    return floors[0]


def test_every_room_has_a_floor() -> None:
    house = {room for floor in FLOORS for room in floor}
    wing = {f"data.{room}" for floor in DATA_FLOORS for room in floor}
    assert set(MODULES) == house | wing, "give the new room a floor in tests/test_imports.py"


@pytest.mark.parametrize("room", [room for room in MODULES if not room.startswith("data")])
def test_imports_go_downward(room: str) -> None:
    upward = {other for other in rooms_imported(room) if floor_of(other) >= floor_of(room)}
    assert not upward, f"{room} (floor {floor_of(room)}) imports {upward}"
    if room not in ("pretrain", "demo"):  # the wiring
        inner = {other for other in rooms_imported(room) if other.startswith("data.")}
        assert not inner, f"{room} goes past the door of the wing: import {inner} from mora_ds.data"


def test_no_room_stands_higher_than_it_must() -> None:
    """Keeps the table honest: a floor is what a room leans on, not where somebody felt like putting it."""
    for number, rooms in enumerate(FLOORS):
        needed = max((floor_of(other) + 1 for room in rooms for other in rooms_imported(room)), default=0)
        assert needed >= number, f"no room of floor {number} needs to stand there"


def test_the_data_wing_is_in_order_and_sees_nothing_of_the_house() -> None:
    floor = {f"data.{room}": number for number, rooms in enumerate(DATA_FLOORS) for room in rooms}
    for room in floor:
        inside = {other for other in rooms_imported(room) if other.startswith("data.")}
        assert all(floor[other] < floor[room] for other in inside), (room, inside)
        assert rooms_imported(room) - inside <= DATA_SEES, room
    assert all(other in floor for other in rooms_imported("data"))


def test_no_two_rooms_import_each_other() -> None:
    for room in MODULES:
        for other in rooms_imported(room):
            assert room not in everything_below(other), f"{room} and {other} are a circle"


def test_deepspeed_is_imported_by_few() -> None:
    assert {room for room in MODULES if "deepspeed" in libraries(room)} == DEEPSPEED


@pytest.mark.parametrize("room", WITHOUT_DEEPSPEED)
def test_deepspeed_is_needed_by_few(room: str) -> None:
    assert not everything_below(room) & DEEPSPEED


def test_torch_distributed_is_imported_by_few() -> None:
    found = {room for room in MODULES if any(name.startswith("torch.distributed") for name in IMPORTS[room])}
    assert found == DISTRIBUTED


def test_what_the_lowest_rooms_may_use() -> None:
    for room in STANDARD_LIBRARY_ONLY:
        assert not libraries(room), (room, libraries(room))
    assert libraries("operators") == {"torch"}
    assert libraries("tables") == {"torch", "numpy"}
    assert libraries("zero") == {"deepspeed", "torch"}
    assert not rooms_imported("zero"), "zero knows DeepSpeed, not MoRA"


def test_entries_are_thin_and_nothing_imports_them() -> None:
    entries = [*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    assert entries
    for room in MODULES:
        assert not {name.split(".")[0] for name in IMPORTS[room]} & {"launch", "tools", "tests"}, room
    for entry in entries:
        assert "deepspeed" not in {name.split(".")[0] for name in imports(entry)}, entry


def test_the_public_names_are_there() -> None:
    assert len(set(mora_ds.__all__)) == len(mora_ds.__all__) > 5
    for name in mora_ds.__all__:
        assert getattr(mora_ds, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mora_ds.nothing  # noqa: B018
    for name, home in mora_ds._HOME.items():
        assert getattr(import_module(f"mora_ds.{home}"), name) is getattr(mora_ds, name)
