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
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mora_ds.checkpoint import writer as checkpoints
from mora_ds.checkpoint.folder import resume_checkpoint
from mora_ds.checkpoint.layout import complete_checkpoints
from mora_ds.checkpoint.state import TrainerState, check_identity, check_world_size
from mora_ds.common import files
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import replace_symlink, verify_manifest
from mora_ds.engine import shard_writer
from tests.helpers.damage import checkpoint_at
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, job, launch, refused, run

MERGING = ("--max_steps", 6, "--merge_every", 2, "--restart_warmup_steps", 1, "--save_steps", 2)


@pytest.fixture(scope="module")
def out(user: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with two merges, and norms trained."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run(2, user.flags(folder, *MERGING, "--train_norms", "true"))
    return folder


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
def test_a_checkpoint_holds_no_base_weight(user: Playground, out: Path) -> None:
    """No tensor has the shape of one, none is large enough to hide one, no float of one stands in a row anywhere."""
    base = AutoModelForCausalLM.from_pretrained(user.model)
    frozen = {name: tensor for name, tensor in base.named_parameters() if "norm" not in name}
    shapes = {tuple(tensor.shape) for tensor in frozen.values()}
    checkpoint = out / "checkpoints" / "latest"
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
def test_its_files_and_links(out: Path) -> None:
    checkpoint = out / "checkpoints" / "latest"
    assert os.readlink(checkpoint) == "step-000006"
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == [
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
    assert not list((out / "checkpoints").glob(".*")), "nothing half-written stays"
    cycle = out / "ledger" / "cycle-00000.safetensors"
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


# -- finding one ---------------------------------------------------------------------------------------------------


def test_auto_takes_the_newest_whole_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = checkpoint_at(tmp_path, 9), checkpoint_at(tmp_path, 10)
    third = checkpoint_at(tmp_path, 1_000_000)  # one digit more than the name is padded to
    assert resume_checkpoint("auto", tmp_path) == third and not caplog.messages
    (third / "file").write_text("else")
    (second / "manifest.json").unlink()
    assert resume_checkpoint("auto", tmp_path) == first
    assert (
        len(caplog.messages) == 2
        and str(third) in caplog.messages[0]
        and "manifest.json is missing" in caplog.messages[1]
    )
    assert resume_checkpoint("auto", tmp_path / "none") is None


def test_latest_and_paths_must_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint_at(tmp_path, 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    replace_symlink(tmp_path / "latest", folder.name)
    for wanted in ("latest", str(folder), str(tmp_path / "latest"), "~/step-000003"):
        assert resume_checkpoint(wanted, tmp_path) == folder
    (folder / "file").unlink()
    with pytest.raises(UserError, match=r"latest: .*step-000003 is damaged: .*file is missing.*auto"):
        resume_checkpoint("latest", tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        resume_checkpoint(str(tmp_path / "step-000007"), tmp_path)


@pytest.mark.parametrize("root", [".", "linked", "absolute"])
def test_auto_stays_on_the_branch_of_latest(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the folder is named: relative to where one is, through a link, or by its own path."""
    old, new, other = (checkpoint_at(tmp_path / "own", step) for step in (2, 4, 9))
    (tmp_path / "linked").symlink_to("own")
    monkeypatch.chdir(tmp_path / "own")
    place = {".": Path("."), "linked": tmp_path / "linked", "absolute": tmp_path / "own"}[root]
    replace_symlink(place / "latest", new.name)
    assert resume_checkpoint("auto", place) == place / new.name
    (new / "file").unlink()
    assert resume_checkpoint("auto", place) == place / old.name
    assert other.is_dir()


def test_differences_are_told_by_flag_and_all_at_once(tmp_path: Path) -> None:
    saved = {"base": "a", "adapter": {"rank": 8, "target_modules": ["q_proj"]}, "seed": 1}
    check_identity(tmp_path, saved, {**saved, "adapter": {"rank": 8, "target_modules": ("q_proj",)}})
    with pytest.raises(UserError) as error:
        check_identity(tmp_path, saved, {"base": "b", "adapter": {"rank": 4, "target_modules": ["q_proj"]}, "more": 1})
    rank = "--mora_rank (or --lora_rank): 8 there, 4 here"
    for part in ("--model_name_or_path", rank, "seed: 1 there, None here", "more: None"):
        assert part in str(error.value)
    assert "target_modules" not in str(error.value)
    incremental, exact = ({**saved, "merge_precision": value} for value in ("incremental", "exact"))
    with pytest.raises(UserError, match="incremental merges were removed after version"):
        check_identity(tmp_path, incremental, exact)


@pytest.mark.parametrize(("rows", "divisors"), [(12, "1, 2, 3, 4, 6 or 12"), (2, "1 or 2"), (1, "1")])
def test_ranks_that_cannot_share_the_rows_are_told_who_can(tmp_path: Path, rows: int, divisors: str) -> None:
    files.write_json_atomic(tmp_path / "trainer_state.json", vars(TrainerState(identity={"global_batch_size": rows})))
    for world in range(1, 30):
        if rows % world == 0:
            check_world_size(tmp_path, world)
            continue
        words = f"{rows} sequences a step, which {world} ranks cannot share evenly: start {divisors} of them"
        with pytest.raises(UserError, match=words):
            check_world_size(tmp_path, world)


def test_differences_of_a_mixture_are_told_with_their_source(tmp_path: Path) -> None:
    saved, now = ({"mixture": {"weights": {"0": {"law": weight}}}} for weight in (0.5, 0.25))
    with pytest.raises(UserError, match=r"weights of --mixture, 0\.law: 0\.5 there, 0\.25 here"):
        check_identity(tmp_path, saved, now)


def test_random_states_of_ranks_with_and_without_a_saved_one(tmp_path: Path) -> None:
    """A rank's own state where it has one; otherwise one of its own, another at every step, the same each time."""
    states = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    save_file({"cpu": torch.stack(states)}, tmp_path / "rng.safetensors")

    def drawn(rank: int, step: int = 5, seed: int = 0) -> float:
        checkpoints._load_rng(tmp_path, rank, TrainerState(step=step, identity={"seed": seed}))
        return torch.rand(1).item()

    kept = torch.get_rng_state()
    try:
        for rank, seed in enumerate((3, 4)):
            expected = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
            assert drawn(rank) == expected
        others = [drawn(2), drawn(3), drawn(2, step=6), drawn(2, seed=1)]
        assert len(set(others)) == 4 and others[0] == drawn(2)
    finally:
        torch.set_rng_state(kept)


def test_ranks_that_trained_something_else_write_no_checkpoint(tmp_path: Path) -> None:
    def share(rank: int, **facts: Any) -> Any:
        return checkpoints._Share({}, SimpleNamespace(rank=rank, facts=facts), {})  # type: ignore[arg-type]

    shares = [share(0, stage=3, lr=0.1), share(1, stage=3, lr=0.2), share(2, stage=3, lr=0.1)]
    alone: Any = SimpleNamespace(ranks=SimpleNamespace(on_first=lambda check, work: work()))
    writer = checkpoints.CheckpointWriter(tmp_path, None, lambda step: lambda folder: None, followers=alone)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"ranks \[1\] trained other parameters or with other settings than rank 0"):
        writer._complete(tmp_path / "beside", tmp_path / "step-000001", shares, None, {}, None)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


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


def one_full_disk(argv: list[str], rank: int) -> tuple[str, str]:
    """The disk of one rank's node is full from the second checkpoint on."""
    write = shard_writer.write_now

    def fail(path: Path, content: Any) -> None:
        if torch.distributed.get_rank() == rank and "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    shard_writer.write_now = fail
    return refused(argv)


@pytest.mark.gloo
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_on_one_node_ends_all_ranks(user: Playground, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "out"
    for kind, message in run_ranks(2, one_full_disk, user.flags(out, *MERGING), rank):
        assert kind == "RunError" and f"the disk that holds {out / 'checkpoints'} is full" in message
        assert rank == 0 or "rank 1: " in message
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
