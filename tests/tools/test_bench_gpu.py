"""tools/bench/gpu.py: every question at toy sizes on the CPU, so that nothing is first run
on rented hardware.
"""

import warnings
from pathlib import Path

import pytest
import torch

from mora_ds.common.files import read_json
from tests.helpers import plain_kernels  # noqa: F401  (the kernels' operations, for tensors of a CPU)
from tests.helpers.gloo import run_alone
from tests.helpers.tools import call, tool

QUESTIONS = ("ceilings", "operators", "layer", "attention", "step", "resume")


def answers(folder, questions):
    for question in questions:
        call("bench/gpu", question, "--toy", "--json", f"{folder}/{question}.json")
    contents = {
        question: read_json(Path(folder, f"{question}.json")) for question in questions
    }
    return {
        question: content["tables"][question][1:]
        for question, content in contents.items()
    }


def check(results, waits):
    for name, dtype, _, *errors, merge in results["operators"]:
        assert merge == "same bits", name
        assert max(map(float, errors)) < (1e-5 if dtype == "float32" else 5e-2), (
            name,
            dtype,
        )
    assert len(results["operators"]) >= 4 * 3 * 2
    assert len(results["ceilings"]) == 6
    assert [row[:2] for row in results["layer"]] == [
        ["48 x 80, 64, bfloat16", operator]
        for operator in ("rotate r=8", "share r=256")
    ]
    assert [leak for *_, leak in results["attention"]] == ["0", "0", "0"]
    assert [(row[0], row[-1]) for row in results["step"]] == [
        (stage, waits) for stage in ("1", "2", "3")
    ]
    assert results["resume"] == [["3", "same"]]


def test_help_names_every_question():
    assert set(tool("bench/gpu").QUESTIONS) == set(QUESTIONS)


def test_every_question_runs_at_toy_size(tmp_path):
    tables = run_alone(answers, str(tmp_path), QUESTIONS)
    check(tables, "only a GPU can say")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_question_runs_on_a_gpu(tmp_path):
    check(run_alone(answers, str(tmp_path), QUESTIONS), "0")


def test_waits_of_the_host_are_counted_and_end_nothing(monkeypatch):
    """A stand-in replaces what torch does on CUDA."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    called = "called a synchronizing CUDA operation"
    with tool("bench/gpu").counted_waits(torch.device("cuda")) as waits:
        for message in (called, "something else", called):
            warnings.warn(message, stacklevel=1)
    assert len(waits) == 2
    assert modes == ["warn", "default"]
