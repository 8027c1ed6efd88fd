"""The main job at t x dp: the run of one rank, its checkpoints resumed at any other t x dp,
its merges and exports.
"""

import shutil

import pytest
from torch.testing import assert_close

from mora_ds.checkpoint.shard_table import EngineShards
from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.files import sha256_file
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import losses, printed, rows, run
from tests.helpers.outcome import assert_good
from tests.helpers.tables import heavy

STEPS = 6
HALF = 4
ROWS = 4
"""Sequences a step."""
RUNS = {
    "rotate": "--operator rotate --train_norms --train_embeddings",
    "share": "--operator share --mora_rank 4 --train_embedding_rank 3",
}


def flags(user, out, degree, replicas, *more):
    split = (
        f"--tensor_parallel_size {degree} --gradient_accumulation_steps 2 "
        f"--per_device_train_batch_size {ROWS // replicas // 2}"
    )
    steps = (
        f"--max_steps {STEPS} --save_steps {HALF} --merge_every 3 --restart_warmup_steps 1 "
        "--adam_epsilon 0.0001"
    )
    return user.flags(out, split, steps, *more)


@pytest.fixture(scope="module", params=["share", heavy("rotate")])
def saved(request, user):
    """(name, run of (2, 2), losses of (1, 1))."""
    more = RUNS[request.param]
    alone = user.root / f"{request.param}-alone"
    shared = user.root / f"{request.param}-2-2"
    run(1, flags(user, alone, 1, 1, more))
    run(4, flags(user, shared, 2, 2, more, "--export_merged"))
    return request.param, shared, losses(alone)


def test_it_is_the_run_of_one_rank(saved, user):
    name, out, curve = saved
    assert_close(losses(out), curve, rtol=1e-5, atol=0)
    alone = user.root / f"{name}-alone"
    for mine, theirs in zip(rows(out), rows(alone), strict=True):
        for key in ("grad_norm", "loss_after", "mora_matrix_norm", "delta_norm"):
            expected = pytest.approx(theirs.get(key, 0.0), rel=1e-4)
            assert mine.get(key, 0.0) == expected, (key, mine)
    for step in (HALF, STEPS):
        folder = f"checkpoints/step-{step:06d}"
        assert_good(out / folder)
        here = EngineShards.open(out / folder / "engine")
        there = EngineShards.open(alone / folder / "engine")
        assert here.layout.shapes == there.layout.shapes


@pytest.mark.parametrize(
    "degree, replicas", [(1, 2), (4, 1), *(heavy(*size) for size in ((2, 1), (1, 4)))]
)
def test_it_resumes_at_another_size(saved, user, degree, replicas):
    name, out, expected = saved
    copy = user.root / f"{name}-{degree}-{replicas}"
    shutil.copytree(out, copy, symlinks=True)
    shutil.rmtree(copy / f"checkpoints/step-{STEPS:06d}")
    at_once = f"--gradient_accumulation_steps 1 --per_device_train_batch_size {ROWS // replicas}"
    resume = ("--resume_from_checkpoint", copy / f"checkpoints/step-{HALF:06d}")
    run(
        degree * replicas,
        flags(user, copy, degree, replicas, RUNS[name], at_once, *resume),
    )
    assert_close(losses(copy)[-1], expected[-1], rtol=1e-5, atol=0)


def hashes(folder, pattern):
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def test_the_same_bytes_at_every_size(saved, user):
    """Adapter, merge ledger and merged model of one state, saved and exported by one rank
    and by others.
    """
    name, out, _ = saved
    hashed = []
    for degree, replicas in ((1, 1), (2, 1), (2, 2)):
        copy = user.root / f"{name}-bytes-{degree}-{replicas}"
        shutil.copytree(out, copy, symlinks=True)
        step = copy / f"checkpoints/step-{HALF:06d}"
        more = (
            f"{RUNS[name]} --export_merged --max_steps {HALF} --resume_from_checkpoint"
        )
        run(degree * replicas, flags(user, copy, degree, replicas, more, step))
        assert TrainerState.read(step).world_size == degree * replicas, "saved anew"
        hashed.append(
            {
                **hashes(step, "adapter.*"),
                **hashes(step, "ledger/*"),
                **hashes(copy, "merged/*.safetensors"),
            }
        )
    assert len(hashed[0]) >= 5
    assert hashed[0] == hashed[1] == hashed[2]


# -- before it begins ------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_keeps_the_folder_unchanged(user, out):
    out.mkdir()
    (out / "run.yaml").write_text("seed: 1")
    (out / "metrics.jsonl").write_text("")
    argv = user.flags(out, "--tensor_parallel_size 2 --dry_run --overwrite_output_dir")
    text = run_ranks(2, printed, argv)[0]
    for words in (
        "tensor parallel, 2 ranks a group; every rank has the complete base",
        "computed completely on every rank: lm_head",
        "base, unsharded",
        "dry run: nothing was trained",
    ):
        assert words in text
    assert "step 1" not in text
    left = {
        path.name: path.read_text() for path in out.iterdir() if path.name != ".lock"
    }
    assert left == {"run.yaml": "seed: 1", "metrics.jsonl": ""}
