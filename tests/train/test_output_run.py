"""Whole runs and their output folder: what of the user's they refuse to touch, and the mode
of what they write.
"""

import fcntl
import json
import os
import stat
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from mora_ds.commands.pretrain import train
from mora_ds.common.errors import UserError
from mora_ds.common.files import read_json
from mora_ds.config.arguments import parse
from mora_ds.train import demo, pretrain
from mora_ds.train.output_folder import LOCK
from tests.helpers.gloo import run_alone, run_ranks
from tests.helpers.jobs import ZERO3, job, output_of, refused_each
from tests.helpers.models import tiny_model
from tests.helpers.snapshot import untouched


@pytest.fixture(scope="module")
def pickled(user):
    """A model whose weights are pickled, and notes of the user's, in the folder `base` of
    an output folder.
    """
    folder = user.root / "pickled/base"
    model = tiny_model(vocab_size=400, num_hidden_layers=2)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    for path in user.model.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "notes.txt").write_text("mine")
    return folder


def test_what_is_the_users_is_refused_and_named(user, pickled, tmp_path):
    """H1: a pickled model in OUT/base. H2: OUT/tokenizer, OUT/ledger and OUT/metrics.jsonl
    without a run.
    """
    for name in ("tokenizer/tokenizer.json", "ledger/notes.txt", "metrics.jsonl"):
        path = tmp_path / name.partition("/")[0].partition(".")[0] / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    cases = {
        f"--model_name_or_path {pickled}: the run would read": user.flags(
            pickled.parent, "--model_name_or_path", pickled, "--target_modules q_prj"
        ),
        "holds base, and no run": user.flags(pickled.parent, "--overwrite_output_dir"),
        "--tokenizer_name": user.flags(
            tmp_path / "tokenizer", "--tokenizer_name", tmp_path / "tokenizer/tokenizer"
        ),
        "holds tokenizer, and no run": user.flags(tmp_path / "tokenizer"),
        "holds ledger, and no run": user.flags(
            tmp_path / "ledger", "--overwrite_output_dir"
        ),
        "holds metrics.jsonl, and no run": user.flags(
            tmp_path / "metrics", "--resume_from_checkpoint auto"
        ),
        "--output_dir must not be empty": user.flags(""),
    }
    with untouched(tmp_path), untouched(pickled):
        results = run_alone(refused_each, list(cases.values()))
    for phrase, (kind, message) in zip(cases, results, strict=True):
        assert kind == "UserError", message
        assert phrase in message, message


def run_privately(argv):
    """A run that gives its group read access and others none. For `run_ranks`."""
    os.umask(0o027)
    return job(argv)


def test_all_files_have_the_mode_that_the_umask_asks_for(user, pickled, tmp_path, out):
    """Base, checkpoints, merged model and token cache included; no secret of DeepSpeed's
    file is in any of them.
    """
    cache = tmp_path / "cache"
    secret = {**read_json(ZERO3), "comet": {"enabled": False, "api_key": "s3cret"}}
    (tmp_path / "ds.json").write_text(json.dumps(secret))
    more = (
        "--export_merged",
        "--cache_dir",
        cache,
        "--deepspeed",
        tmp_path / "ds.json",
    )
    argv = user.flags(out, "--model_name_or_path", pickled, *more)
    run_alone(run_privately, argv)
    assert (out / "base/model.safetensors").is_file()
    assert (out / "merged/config.json").is_file()
    for path in (*out.rglob("*"), *cache.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert oct(mode) == oct(0o750 if path.is_dir() else 0o640), path
        assert path.is_dir() or b"s3cret" not in path.read_bytes(), path
    resolved = yaml.safe_load((out / "run.yaml").read_text())["resolved"]
    assert resolved["owns"].count("base") == 1


def shared_lock(argv):
    """Whether this rank holds the output folder when its run begins, as another process
    sees it. For `run_ranks`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "_run", lambda arguments, job, schedule: {})
        job(argv)
    dist.barrier()
    if not (child := os.fork()):
        byte = 0 if dist.get_rank() == 0 else 1
        file = os.open(Path(output_of(argv)) / LOCK, os.O_RDWR)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except BlockingIOError:
            os._exit(7)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    dist.barrier()
    return status == 7


def test_every_rank_holds_the_folder_while_it_may_write(user, out):
    assert run_ranks(2, shared_lock, user.flags(out)) == [True, True]


# -- the demo --------------------------------------------------------------------------


def demo_refused(argv):
    """The message with which the demo is refused at the start of its main job. For
    `run_ranks`.
    """

    def write_inputs(paths, seed):
        for folder in (paths.corpus, paths.warm):
            folder.mkdir(parents=True)
            (folder / "file").write_text("new")

    def raise_validation_errors(arguments, ranks):
        raise UserError("--eval_files: no file")

    demo.write_inputs = write_inputs
    demo.pretrain = raise_validation_errors
    with pytest.raises(UserError) as caught:
        train(parse(argv))
    return str(caught.value)


def demos_refused(cases):
    return [demo_refused(argv) for argv in cases]


def test_a_demo_that_is_refused_leaves_its_folder_as_it_was(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "mine/demo").mkdir(parents=True)
    (tmp_path / "mine/demo/notes.txt").write_text("mine")
    (tmp_path / "run/demo/warm_start/merged").mkdir(parents=True)
    (tmp_path / "run/run.yaml").write_text(
        "versions: {}\nresolved: {owns: [run.yaml, demo]}\n"
    )
    cases = {
        str(tmp_path / "new"): "no file",
        str(tmp_path / "not/there"): "no file",
        str(tmp_path / "mine"): "holds demo, and no run",
        str(tmp_path / "run"): "no file",
    }
    argvs = [
        [
            "--output_dir",
            out,
            *(["--overwrite_output_dir"] if out.endswith("run") else []),
        ]
        for out in cases
    ]
    with untouched(tmp_path):
        results = run_alone(demos_refused, argvs)
    for message, phrase in zip(results, cases.values(), strict=True):
        assert phrase in message
