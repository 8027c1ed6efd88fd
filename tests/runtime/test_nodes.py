"""Nodes that do not see the output folder: the run is kept on rank 0's node, the same run to the bit."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import RunError, UserError
from mora_ds.runtime import nodes
from mora_ds.runtime.nodes import Followers
from mora_ds.runtime.ranks import Ranks
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import Playground, losses, run
from tests.helpers.nodes import job_on_two_nodes, on_another_node
from tests.helpers.resume import assert_same_tensors, checkpoint_tensors

pytestmark = pytest.mark.gloo

MORE = ("--merge_every", 2, "--restart_warmup_steps", 1, "--save_steps", 2, "--mora_dropout", 0.1, "--train_norms")


@pytest.fixture(scope="module")
def whole(user: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(3, user.flags(out, *MORE))
    return out


def run_on_two_nodes(user: Playground, first: Path, other: Path, *more: str | int) -> dict[str, Any]:
    return run_ranks(3, job_on_two_nodes, user.flags("unused", *MORE, *more), str(first), str(other))[0]


@pytest.mark.parametrize("saving", [(), ("--async_save",)], ids=["at once", "in the background"])
def test_a_run_is_kept_on_one_node(user: Playground, whole: Path, tmp_path: Path, saving: tuple[str, ...]) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    run_on_two_nodes(user, first, other, *saving)
    assert torch.equal(losses(first), losses(whole))
    assert_same_tensors(checkpoint_tensors(first), checkpoint_tensors(whole))
    assert all(verdict.is_good for verdict in verify(first, None)), "every shard has arrived"
    assert not other.exists(), "the follower's folder is deleted"


def test_it_resumes_whatever_lies_on_the_other_node(user: Playground, whole: Path, tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    (other / "ledger").mkdir(parents=True)
    (other / "ledger" / "ledger.json").write_text("of a run that this node once kept")
    (other / ".follower").mkdir()
    (other / ".follower" / "left").write_text("by a killed one")
    shutil.copytree(whole, first, symlinks=True)
    checkpoint = first / "checkpoints" / "step-000002"
    run_on_two_nodes(user, first, other, "--resume_from_checkpoint", str(checkpoint))
    assert torch.equal(losses(first), losses(whole))
    assert_same_tensors(checkpoint_tensors(first), checkpoint_tensors(whole))
    assert sorted(path.name for path in other.rglob("*")) == ["ledger", "ledger.json"]


def test_a_base_and_a_tokenizer_made_by_the_run_reach_every_node(user: Playground, tmp_path: Path) -> None:
    """--model_config creates the base, --train_tokenizer_vocab the tokenizer."""
    config = str(Path(__file__).parents[2] / "configs" / "models" / "tiny_llama.json")
    own = ("--model_config", config, "--train_tokenizer_vocab", 360, "--max_steps", 2)
    flags = user.flags("unused", *own)
    at = flags.index("--model_name_or_path")
    del flags[at : at + 2]
    summary = run_ranks(3, job_on_two_nodes, flags, str(tmp_path / "first"), str(tmp_path / "other"))[0]
    assert summary["steps"] == 2 and not (tmp_path / "other").exists()


def parts_moved(first: str, other: str, size: int) -> list[str]:
    """Files of a follower are moved to rank 0, and a folder of rank 0 is copied back. Returns names and sizes."""
    folder = on_another_node(Path(first), Path(other))
    nodes._CHUNK = 1000
    followers = Followers.find(folder, Ranks.current())
    beside = followers.folder / "beside"
    if followers.leads:
        beside.mkdir()
        (beside / "deep").mkdir()
        (beside / "deep" / "shard").write_bytes(bytes(range(256)) * size)
        (beside / "empty").write_bytes(b"")
    if dist.get_rank() == 0:
        beside.mkdir()
        (beside / "mine").write_text("kept")
    dist.barrier()
    followers.gather(beside, followers.ranks.group)
    shared = followers.folder / "beside"
    if followers.leads:  # what a transfer that broke off has left
        broken = shared.with_name("beside.incoming")
        broken.mkdir()
        for name in ("stale", "mine"):
            (broken / name).write_text("half")
    followers.share(shared)
    names = sorted(f"{path.relative_to(shared)} {path.stat().st_size}" for path in shared.rglob("*") if path.is_file())
    assert not followers.leads or (shared / "deep" / "shard").read_bytes() == bytes(range(256)) * size
    return names


def test_files_are_sent_in_chunks(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    moved = run_ranks(3, parts_moved, str(tmp_path / "first"), str(tmp_path / "other"), 17)
    assert moved == [[f"deep/shard {256 * 17}", "empty 0", "mine 4"]] * 3


class Sent:
    """In place of `torch.distributed`: what one end has sent is what the other one receives."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def send_object_list(self, objects: list[Any], dst: int, group: Any) -> None:
        self.messages.append(objects[0])

    def recv_object_list(self, objects: list[Any], src: int, group: Any) -> None:
        objects[0] = self.messages.pop(0)

    def send(self, tensor: torch.Tensor, dst: int, group: Any) -> None:
        self.messages.append(tensor.clone())

    def recv(self, tensor: torch.Tensor, src: int, group: Any) -> None:
        tensor.copy_(self.messages.pop(0))


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What a follower has sent: a file of three chunks, one of exactly two, an empty one."""
    monkeypatch.setattr(nodes, "_CHUNK", 10)
    for name, size in (("deep/three", 21), ("empty", 0), ("two", 20)):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(bytes(range(size)))
    transport = Sent()
    monkeypatch.setattr(nodes, "dist", transport)
    nodes._send_files(tmp_path / "from", 0, None)
    return transport


def test_what_arrives_is_what_was_sent_and_is_on_disk(
    sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(nodes, "fsync", lambda path: flushed.append(path.name))
    assert [len(each) for each in sent.messages] == [3, 10, 10, 1, 10, 10]
    nodes._receive_files(tmp_path / "to", 1, None)
    for name in ("deep/three", "empty", "two"):
        assert (tmp_path / "to" / name).read_bytes() == (tmp_path / "from" / name).read_bytes()
    assert flushed == ["three", "empty", "two"]


@pytest.mark.parametrize("fault", ["opening", "flushing"])
def test_a_disk_that_fails_is_told_once_everything_is_received(
    sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The sender must not wait without end."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if fault == "flushing":
        monkeypatch.setattr(nodes, "fsync", full)
    else:
        (tmp_path / "to").mkdir()
        (tmp_path / "to" / "deep").write_text("a file, where there is to be a folder")
    with pytest.raises((RunError, OSError)):
        nodes._receive_files(tmp_path / "to", 1, None)
    assert sent.messages == []


def test_a_file_that_becomes_shorter_is_told(sent: Sent, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two became shorter while it was sent"):
        list(nodes._parts(tmp_path / "from" / "two", 21))


def split_node(first: str, other: str) -> str:
    folder = on_another_node(Path(first), Path(other))
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    try:
        Followers.find(folder, Ranks.current())
    except UserError as error:
        return str(error)
    return ""


def test_one_node_has_one_folder(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    for message in run_ranks(3, split_node, str(tmp_path / "first"), str(tmp_path / "other")):
        assert "--output_dir" in message and "different folders" in message
