"""Whole runs for the tests: a tiny model folder and corpus, `commands.pretrain.train` on forked ranks, or
the real launcher.
"""

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import yaml

from mora_ds.commands.pretrain import train
from mora_ds.common.errors import RunError, UserError
from mora_ds.common.fetched import with_urls
from mora_ds.config.arguments import parse
from mora_ds.data import load_tokenizer, train_sentencepiece
from mora_ds.runtime.log_setup import set_up_logging
from mora_ds.runtime.signals import EXIT_USER_ERROR
from mora_ds.train.output_folder import reserve
from tests.helpers.gloo import context, free_port, run_ranks
from tests.helpers.models import tiny_model
from tests.helpers.snapshot import assert_same, snapshot
from tests.helpers.tables import words
from tests.helpers.texts import json_lines
from tests.helpers.tools import called

REPOSITORY = Path(__file__).resolve().parents[2]
ZERO3 = REPOSITORY / "configs/zero3.json"
VOCABULARY = 400


@dataclass(frozen=True)
class Playground:
    """The files of a user."""

    root: Path
    model: Path
    train: Path
    """JSON lines: about 60 documents, 350 blocks of 32 tokens."""
    held: Path
    other: Path
    """Two texts for evaluation; `other` is shorter than one block."""

    def texts(self):
        """The documents of `train`."""
        return [
            json.loads(line)["text"] for line in self.train.read_text().splitlines()
        ]

    def flags(self, out, *more):
        """A small run; later flags win. `more`: for `words`."""
        chosen = words(*more)
        adapters = [value for flag, value in pairwise(chosen) if flag == "--adapter"]
        adapter = ["mora", *adapters][-1]
        rank = ["--mora_rank", "2"] if adapter in ("mora", "lora") else []
        return words(
            "--deepspeed", ZERO3, "--model_name_or_path", self.model, "--train_files", self.train,
            "--eval_files", self.held, f"short={self.other}", "--output_dir", out,
            "--cache_dir", self.root / "cache", *rank, "--seq_len 32 --max_steps 6",
            "--per_device_train_batch_size 2 --learning_rate 1e-2 --warmup_steps 1", *chosen,
        )  # fmt: skip


def golden_flags(user, out, *more):
    """A short run: checkpoints 2 (one cycle), 4 and 6 (two); each of the cycles is one file
    with a name in every checkpoint since. Norms are trained too, and one set is
    evaluated."""
    return user.flags(
        out,
        "--max_steps 6 --merge_every 2 --restart_warmup_steps 1 --save_steps 2 --train_norms true --eval_files",
        f"short={user.other}",
        *map(str, more),
    )


def playground(root):
    """Model, tokenizer and texts under `root`."""
    sources = [
        Path(module.__file__ or "").read_text()
        for module in (argparse, subprocess, random)
    ]
    texts = [
        source[start : start + 700]
        for source in sources
        for start in range(0, 14_000, 700)
    ]
    trained = train_sentencepiece(texts, VOCABULARY, root / "trained")
    model = tiny_model(vocab_size=VOCABULARY, num_hidden_layers=2)
    model.save_pretrained(root / "model")
    load_tokenizer(trained).save_pretrained(root / "model")
    train = root / "train.jsonl"
    held_file = root / "held.txt"
    other_file = root / "other.txt"
    train.write_text(json_lines(texts))
    held_file.write_text(sources[1][20_000:21_200])
    other_file.write_text("def f(x):\n    return x\n")
    return Playground(root, root / "model", train, held_file, other_file)


def research(flags, folder, **settings):
    """The flags after a recipe in `folder` with a block `research:` of these settings."""
    path = folder / "research.yaml"
    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in settings.items()
    }
    path.write_text(yaml.safe_dump({"research": values}))
    return [str(path), *flags]


def job(argv):
    """One rank's share of a run. For `run_ranks`."""
    return train(parse(argv))


def run(ranks, argv):
    """A run on `ranks` ranks of this machine; rank 0's summary."""
    return run_ranks(ranks, job, argv)[0]


def finished_run(ranks, user, folders, *more):
    """The output folder, in a new one of `folders`, of a run with the flags `more` that
    nothing has disturbed.
    """
    out = folders.mktemp("finished") / "out"
    run(ranks, user.flags(out, *more))
    return out


def printed(argv):
    """The output of a run, to stdout and stderr. For `run_ranks`."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as captured,
        contextlib.redirect_stderr(captured),
    ):
        arguments = parse(argv)
        set_up_logging(arguments.training.log_level)
        train(arguments)
    return captured.getvalue()


def refused(argv, may_change=False):
    """(kind of error, its message) of a run that must fail. For `run_ranks`.

    A `UserError` must leave the output folder to the byte as it was, as rank 0 finds it. It
    `may_change` where it is repaired after a killed run, and where the run had begun.
    """
    out = output_of(argv)
    is_watched = int(os.environ["RANK"]) == 0 and not may_change
    before = snapshot(out) if is_watched else {}
    try:
        train(parse(argv))
    except UserError as error:
        if is_watched:
            assert_same(out, before)
        return type(error).__name__, with_urls(error)
    except RunError as error:
        return type(error).__name__, with_urls(error)
    raise AssertionError("the run was not refused")


def refused_each(cases):
    """`refused` of several runs, one after the other. For `run_ranks`."""
    return [refused(argv) for argv in cases]


def output_of(argv):
    """The output folder that a command line names, the default one where it names none."""
    named = [value for flag, value in pairwise(argv) if flag == "--output_dir"]
    return Path([*["out"], *named][-1])


def validation_errors_of(argv, ranks=1):
    """The message of the `UserError` with which all ranks refuse a run."""
    ((kind, message),) = set(run_ranks(ranks, refused, argv))
    assert kind == "UserError", message
    return message


def _reserve(folder, sender):
    reserve(folder)
    sender.send("reserved")
    time.sleep(60)


@contextlib.contextmanager
def held_folder(folder):
    """Within it another process holds the output folder, as a run does; then it is
    killed.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_reserve, args=(folder, sender))
    process.start()
    try:
        assert receiver.recv() == "reserved"
        yield
    finally:
        process.kill()
        process.join()


def launch(ranks, argv, cwd, timeout_s=300):
    """The real launcher, as in the README. Where it ends with a user's error, the output
    folder must be as it was.
    """
    out = cwd / output_of(argv)
    before = snapshot(out)
    done = called(launcher(ranks, argv), cwd=cwd, env=environment(), timeout=timeout_s)
    if done.returncode == EXIT_USER_ERROR:
        assert_same(out, before)
    return done


def launcher(ranks, argv):
    program = Path(sys.executable).with_name("deepspeed")
    # Its default is taken where two test runs share a machine
    port = ["--master_port", str(free_port())]
    return [
        str(program),
        *port,
        "--num_gpus",
        str(ranks),
        str(REPOSITORY / "launch/pretrain.py"),
        *argv,
    ]


def ranks_below(launcher):
    """Process ids of the ranks that a launcher has started; none once it has ended."""
    try:
        family = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process.pid for process in family if is_rank(process.pid)]


def is_rank(process):
    """Whether it runs the job itself: it is no launcher, and no worker process of a
    rank.
    """
    try:
        running = psutil.Process(process)
        has_rank = (
            "RANK" in running.environ() and "RANK" not in running.parent().environ()
        )
        return has_rank and running.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, AttributeError):  # it has ended, or its parent has
        return False


def environment():
    """The launcher starts `python` by name: the one that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def rows(out):
    """`metrics.jsonl`, read as strictly as any JSON reader would (no NaN, no Infinity)."""

    def raise_validation_errors(name):
        raise AssertionError(f"{name} is no JSON")

    text = (out / "metrics.jsonl").read_text()
    return [
        json.loads(line, parse_constant=raise_validation_errors)
        for line in text.splitlines()
    ]


MEASURED = (
    "tokens_per_s",
    "tokens_per_s_per_rank",
    "step_time_s",
    "peak_memory_bytes",
    "bytes_gathered",
)
"""Fields of a row that two equal runs need not share (the first step of an engine gathers
more than the others).
"""


def curve(out):
    """`metrics.jsonl` without what was measured on the machine."""
    return [
        {key: value for key, value in row.items() if key not in MEASURED}
        for row in rows(out)
    ]


def losses(out):
    """(steps,) the loss of every logged step."""
    return torch.tensor(
        [row["loss"] for row in rows(out) if "loss" in row], dtype=torch.float64
    )


def assert_close_losses(out, reference, rtol=1e-5, atol=0):
    """The losses of a run are those of another one, to within rounding."""
    torch.testing.assert_close(losses(out), losses(reference), rtol=rtol, atol=atol)
