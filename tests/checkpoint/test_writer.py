"""What a checkpoint holds, when `latest` moves, what is kept, and what a full disk does."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mora_ds.checkpoint import writer as checkpoints
from mora_ds.checkpoint.layout import complete_checkpoints
from mora_ds.common import files
from mora_ds.common.errors import RunError
from mora_ds.common.files import verify_manifest
from mora_ds.engine import shard_writer
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, golden_flags, job, launch, refused

# -- what it holds -------------------------------------------------------------------------------------------------


def tensors_within(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_within(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_within(part)


def tensors_of(checkpoint: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (not a mapping)
                    yield path, handle.get_tensor(name)
        elif path.suffix == ".pt":
            loaded = torch.load(path, map_location="cpu", weights_only=False)  # DeepSpeed's, written a moment ago
            for tensor in tensors_within(loaded):
                yield path, tensor


@pytest.mark.gloo
def test_a_checkpoint_holds_no_base_weight(user: Playground, golden: Path) -> None:
    """No tensor has the shape of one, none is large enough to hide one, no float of one stands in a row anywhere."""
    base = AutoModelForCausalLM.from_pretrained(user.model)
    frozen = {name: tensor for name, tensor in base.named_parameters() if "norm" not in name}
    shapes = {tuple(tensor.shape) for tensor in frozen.values()}
    checkpoint = golden / "checkpoints" / "latest"
    found = list(tensors_of(checkpoint.resolve()))
    assert {path.parent.name for path, _ in found} >= {"engine", "ledger"}
    trainable = 1_680
    for path, tensor in found:
        assert tuple(tensor.shape) not in shapes, path
        assert tensor.numel() <= max(trainable, 8 * 400) or path.name == "rng.safetensors", path
    content = b"".join(path.read_bytes() for path in checkpoint.resolve().rglob("*") if path.is_file())
    for name, tensor in frozen.items():
        assert tensor.detach().numpy().tobytes()[:64] not in content, name


@pytest.mark.gloo
def test_its_files_and_links(golden: Path) -> None:
    checkpoint = golden / "checkpoints" / "latest"
    assert os.readlink(checkpoint) == "step-000006"
    assert [path.name for path in complete_checkpoints(golden / "checkpoints")] == [
        "step-000002", "step-000004", "step-000006",
    ]  # fmt: skip
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "engine", "ledger", "tokenizer", "adapter.json", "adapter.safetensors", "base.json", "probe.safetensors",
        "rng.safetensors", "trainer_state.json", "manifest.json",
    }  # fmt: skip
    engine = {path.name for path in (checkpoint / "engine").iterdir()}
    shards = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)}
    assert engine == {"layouts.safetensors", *shards}, "one file a rank"
    assert verify_manifest(checkpoint) == []
    assert AutoTokenizer.from_pretrained(checkpoint / "tokenizer").eos_token == "</s>"
    assert not list((golden / "checkpoints").glob(".*")), "nothing half-written stays"
    cycle = golden / "ledger" / "cycle-00000.safetensors"
    assert (checkpoint / "ledger" / cycle.name).samefile(cycle), "a link, not a copy a checkpoint"


def watched_job(argv: list[str]) -> list[tuple[str, str]]:
    """Runs; (what `latest` named, whether its manifest verified) each time just before and just after it moves."""
    seen: list[tuple[str, str]] = []
    move = checkpoints.files.replace_symlink

    def watch(link: Path, target: str) -> None:
        before = os.readlink(link) if link.is_symlink() else ""
        assert verify_manifest(link.parent / target) == [], "the new checkpoint is whole before `latest` names it"
        move(link, target)
        seen.append((before, os.readlink(link)))

    checkpoints.files.replace_symlink = watch
    job(argv)
    return seen


@pytest.mark.gloo
def test_latest_moves_last_and_only_so_many_are_kept(user: Playground, tmp_path: Path) -> None:
    argv = user.flags(tmp_path / "out", "--save_steps", 1, "--save_total_limit", 2)
    assert run_ranks(1, watched_job, argv)[0] == [
        ("", "step-000001"), *((f"step-{i:06d}", f"step-{i + 1:06d}") for i in range(1, 6)),
    ]  # fmt: skip
    kept = complete_checkpoints(tmp_path / "out" / "checkpoints")
    assert [path.name for path in kept] == ["step-000005", "step-000006"]


def flushed_job(argv: list[str]) -> list[str]:
    """What a run flushes, renames and links, in order, from its first checkpoint's manifest on."""
    events: list[str] = []
    flush, rename, link = os.fsync, checkpoints._replace_folder, checkpoints.files.replace_symlink

    def fsync(descriptor: int) -> None:
        flush(descriptor)
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replace_folder(beside: Path, final: Path) -> None:
        rename(beside, final)
        events.append(f"{beside} -> {final.name}")

    def replace_symlink(path: Path, target: str) -> None:
        events.append(f"{path} links")
        link(path, target)

    os.fsync, checkpoints._replace_folder, checkpoints.files.replace_symlink = fsync, replace_folder, replace_symlink
    job(argv)
    return events[next(index for index, event in enumerate(events) if "manifest.json" in event) :]


@pytest.mark.gloo
def test_folders_are_flushed_before_and_after_a_checkpoint_gets_its_name(user: Playground, tmp_path: Path) -> None:
    """Without it a power cut may leave the name of a checkpoint without its files, or a link to no checkpoint."""
    events = run_ranks(1, flushed_job, user.flags(tmp_path / "out", "--max_steps", 2))[0]
    renamed = next(index for index, event in enumerate(events) if " -> step-000002" in event)
    beside = events[renamed].split(" -> ")[0]
    linked = next(index for index, event in enumerate(events) if event.endswith("latest links"))
    assert {beside, f"{beside}/engine"} <= set(events[:renamed])
    assert str(tmp_path / "out" / "checkpoints") in events[renamed:linked]


# -- the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [None, 4])
def test_a_checkpoint_is_not_begun_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, degree: int | None
) -> None:
    """16 bytes a trained number, of all tensor-parallel ranks; `ds_numel` where a rank holds no more than its share."""
    parameters = [torch.nn.Parameter(torch.zeros(1000)), torch.nn.Parameter(torch.zeros(3))]
    parameters[1].ds_numel = 5000  # type: ignore[attr-defined]
    mpu = None if degree is None else SimpleNamespace(get_tensor_model_parallel_world_size=lambda: degree)
    engine: Any = SimpleNamespace(module=SimpleNamespace(parameters=lambda: parameters), mpu=mpu, device="cpu")
    one_rank = SimpleNamespace(
        get_world_size=lambda: 1, all_reduce=lambda *_, **__: None, ReduceOp=torch.distributed.ReduceOp
    )
    monkeypatch.setattr(checkpoints, "dist", one_rank)
    needed = 16 * 6000 * (degree or 1)
    for free, is_enough in ((needed, False), (needed + 200_000, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if is_enough:
            checkpoints._check_space(tmp_path, engine)
        else:
            with pytest.raises(RunError, match=r"is full: a checkpoint needs about .* --save_total_limit"):
                checkpoints._check_space(tmp_path, engine)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.gloo
def test_a_full_disk_stops_the_run_and_leaves_what_was_there(
    user: Playground, small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "out"
    argv = user.flags(out, "--save_steps", 1, "--max_steps", 60, "--logging_steps", 60)
    done = launch(2, argv, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"the disk that holds {out}" in done.stderr and "is full" in done.stderr
    assert done.stderr.count("error:") == 1
    root = out / "checkpoints"
    kept = complete_checkpoints(root)
    assert kept and (root / "latest").resolve() == kept[-1]
    assert all(verify_manifest(folder) == [] for folder in kept)
    assert not list(root.glob(".*")), "half a checkpoint would keep the disk full"


def careless_job(argv: list[str]) -> tuple[str, str]:
    """A run that does not look beforehand whether there is room."""
    checkpoints._check_space = lambda root, engine: None
    return refused(argv)


@pytest.mark.gloo
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(user: Playground, small_disk: Path) -> None:
    """Whoever writes first, DeepSpeed, torch or safetensors: none of them says so in the same way."""
    out = small_disk / "out"
    for ballast in range(2):
        (small_disk / f"ballast-{ballast}").write_bytes(bytes(7_000))
        argv = user.flags(out, "--save_steps", 1, "--max_steps", 60, "--logging_steps", 60)
        kind, message = run_ranks(1, careless_job, argv)[0]
        assert kind == "RunError" and f"the disk that holds {out}" in message and "is full" in message
        kept = complete_checkpoints(out / "checkpoints")
        assert kept and all(verify_manifest(folder) == [] for folder in kept)
        assert (out / "checkpoints" / "latest").resolve() == kept[-1]
        shutil.rmtree(out)


def one_full_disk(argv: list[str]) -> tuple[str, str]:
    """The disk of rank 1's node is full from the second checkpoint on."""
    write = shard_writer.write_now

    def fail(path: Path, content: Any) -> None:
        if torch.distributed.get_rank() == 1 and "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    shard_writer.write_now = fail
    return refused(argv)


@pytest.mark.gloo
def test_a_disk_that_is_full_on_one_node_ends_all_ranks(user: Playground, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kind, message in run_ranks(2, one_full_disk, golden_flags(user, out)):
        assert kind == "RunError" and f"the disk that holds {out / 'checkpoints'} is full" in message
        assert "rank 1: " in message
    root = out / "checkpoints"
    assert [folder.name for folder in complete_checkpoints(root)] == ["step-000002"]
    assert (root / "latest").resolve().name == "step-000002" and not list(root.glob(".step*"))


# -- shared storage ----------------------------------------------------------------------------------------------------


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """A file that another node has written, and that is not to be seen yet, with what that node says of it."""
    (folder / "shard").write_bytes(b"content")
    facts = files.record(folder, [folder / "shard"])
    (folder / "shard").rename(folder.parent / "hidden")
    return facts


def test_a_file_that_shared_storage_shows_late_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    facts = recorded(folder)
    timer = threading.Timer(0.3, lambda: (tmp_path / "hidden").rename(folder / "shard"))
    timer.start()
    files.write_manifest(folder, facts)
    timer.join()
    assert verify_manifest(folder) == []


def test_a_file_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    facts = recorded(folder)
    monkeypatch.setattr(files, "VISIBLE_WITHIN_S", 0.2)
    with pytest.raises(RunError, match=r"shard is missing on rank 0's node, 0 s after another rank has written it"):
        files.write_manifest(folder, facts)
    assert not (folder / "manifest.json").exists()
    (folder / "shard").write_bytes(b"short")
    with pytest.raises(RunError, match=r"shard has 5 bytes instead of 7"):
        files.write_manifest(folder, facts)
