"""Runs the tools on mutated, resealed files, each call bounded in time and memory, in
processes that may die.

subjects(folder)                  a small checkpoint, adapter and model
fuzz(subjects, seeds, scratch)    one call of a tool for each seed, and what it found
"""

import contextlib
import io
import random
import resource
import shutil
import signal
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.common.errors import RunError, UserError
from tests.helpers.adapters import Maker
from tests.helpers.crafted import complete_checkpoint, reseal
from tests.helpers.damage import change_json
from tests.helpers.gloo import RankFailed, run_alone
from tests.helpers.jobs import REPOSITORY, playground
from tests.helpers.mutate import Mutator
from tests.helpers.tools import call, called, tool


def seed_of_commit():
    """The same for every run of the tests on one commit."""
    done = called(["git", "rev-parse", "HEAD"], cwd=REPOSITORY)
    return int(done.stdout[:8] or "0", 16)


SECONDS = 10
NBYTES = 2**30
"""The limits of one call: CPU seconds, on a machine that others use too, and bytes."""

Tool = tuple[str, ...]
"""A tool and its flags, with {case} for the case's folder and {out} for the output."""


@dataclass(frozen=True)
class Subject:
    """A folder whose part `mutated` is changed, and the tools that read it, each as often
    as it is listed.
    """

    folder: Path
    mutated: str
    tools: tuple[Tool, ...]


_STEP = "out/checkpoints/step-000007"
_EXPORT = f"export_hf --checkpoint {{case}}/{_STEP} --output {{out}}"
_VERIFY_LEDGER = f"verify_checkpoint {{case}}/{_STEP}/ledger --base {{case}}/base"
_FAST = f"""
verify_checkpoint {{case}}/{_STEP}
verify_checkpoint {{case}}/{_STEP} --base {{case}}/base
convert_checkpoint adapter {{case}}/{_STEP} --output {{out}}
ledger show {{case}}/{_STEP}
{_VERIFY_LEDGER}
{_EXPORT}
convert_checkpoint peft {{case}}/{_STEP} --output {{out}} --rank 4
ledger combine {{case}}/{_STEP} {{case}}/{_STEP} --weights 0.5 0.5 --output {{out}}
"""
_OF_A_MODEL = """
evaluate {case}/base --sets a={case}/held.txt
extend_vocab {case}/base --corpus {case}/held.txt --pieces 2 --output {out}
plan --model {case}/base --gpus 8 --seq_len 8 --micro_batch 1
"""
"""Calls of tools."""


def subjects(folder):
    """Made once, without training. The slow tools, which load a model, are listed apart and
    seldom.
    """
    run = folder / "run"
    fake = complete_checkpoint(run)
    shutil.copytree(fake.checkpoint / "ledger", fake.output / "ledger")
    user = playground(folder / "user")
    model = folder / "model"
    shutil.copytree(user.model, model / "base")
    (model / "held.txt").write_text("a b c")
    maker = Maker(AutoModelForCausalLM.from_pretrained(model / "base"), model / "base")
    maker.write(model / "adapter", MoRAConfig(rank=3), cycles=1)
    change_json(
        model / "adapter/base.json", lambda content: content.update(folder="../base")
    )
    reseal(model / "adapter")
    return [
        Subject(run, _STEP, _calls(_FAST)),
        Subject(run, "base", _calls(f"{_VERIFY_LEDGER}\n{_EXPORT}")),
        Subject(
            model, "adapter", _calls("evaluate {case}/adapter --sets a={case}/held.txt")
        ),
        Subject(run, _STEP, _calls(f"{_EXPORT} --verify")),
        Subject(model, "base", _calls(_OF_A_MODEL)),
    ]


def _calls(text):
    """The words of each line."""
    return tuple(tuple(line.split()) for line in text.strip().splitlines())


WEIGHTS = (60, 8, 3, 2, 8)
"""How often each of the subjects is taken."""


class _TooLong(BaseException):
    pass


def _stop(_, __):
    raise _TooLong


SEEDS_OF_A_PROCESS = 100
"""Seeds per process: what a call leaves in memory reaches at most this many later calls."""


def judged_in_processes(judge, subject, seeds, scratch, seeds_of_a_process, died):
    """The findings of `judge(subject, seeds, scratch)`, in processes that may die: then
    `died(seed, message)` is one. The judge writes the seed that it tries to scratch/seed.
    """
    findings = []
    for first in range(0, len(seeds), seeds_of_a_process):
        some = seeds[first : first + seeds_of_a_process]
        try:
            findings += run_alone(judge, subject, some, scratch, timeout_s=3600)
        except RankFailed as error:
            findings.append(died(int((scratch / "seed").read_text()), str(error)))
    return findings


def fuzz(made, seeds, scratch):
    """The errors of one call for each seed: its seed, tool, changes and error."""
    return judged_in_processes(
        _judged,
        made,
        seeds,
        scratch,
        SEEDS_OF_A_PROCESS,
        lambda seed, message: {"seed": seed, "error": message},
    )


def _judged(made, seeds, scratch):
    """The errors with these seeds, on one rank."""
    for subject in made:
        for name, *_ in subject.tools:
            tool(name)  # imported before memory is bounded
    signal.signal(signal.SIGALRM, _stop)
    signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(
        resource.RLIMIT_AS, (psutil.Process().memory_info().vms + NBYTES,) * 2
    )
    findings = []
    for seed in seeds:
        (scratch / "seed").write_text(str(seed))
        signal.alarm(120)  # for the mutation itself
        finding = {"seed": seed, **_one(made, seed, scratch)}
        findings += [finding] if finding["error"] else []
    return findings


def _one(made, seed, scratch):
    chosen = random.Random(seed)
    (subject,) = chosen.choices(made, WEIGHTS)
    words = chosen.choice(subject.tools)
    case = scratch / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(subject.folder, case, symlinks=True)
    (case / "canary").write_text("of the user")
    mutator = Mutator(seed, case)
    target = case / subject.mutated
    changes = [mutator.mutate(target) for _ in range(chosen.choice((1, 1, 1, 2, 4)))]
    if chosen.random() < 0.93:
        with contextlib.suppress(OSError, ValueError):
            reseal(target)
    before = _state(case)
    error = _error([word.format(case=case, out=case / "made/output") for word in words])
    if not error and _state(case) != before:
        changed = sorted({name for name, _ in before ^ _state(case)})
        error = f"written outside of the output: {changed[:3]}"
    return {
        "tool": " ".join(words),
        "subject": subject.mutated,
        "changes": changes,
        "error": error,
    }


def _state(case):
    """Names, sizes and times of everything but the output."""
    facts = set()
    for path in case.rglob("*"):
        if path.relative_to(case).parts[0] != "made":
            status = path.lstat()
            facts.add(
                (
                    str(path.relative_to(case)),
                    (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns),
                )
            )
    return facts


def _error(words):
    """The traceback of anything but the project's own errors, else ""."""
    quiet = io.StringIO()
    signal.alarm(6 * SECONDS)  # for a call that waits, such as on a pipe
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            call(*words)
    except (UserError, RunError) as error:
        return "" if str(error).strip() else "a message without words"
    except _TooLong:
        return f"more than {SECONDS} s: {traceback.format_exc(limit=-4)}"
    except BaseException:
        return traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    return ""
