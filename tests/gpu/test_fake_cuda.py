"""Every kind of step, on a CUDA device without numbers: nothing is misplaced, and the host
waits for nothing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.fake_cuda import build_shim
from tests.helpers.fake_steps import PAIRS, PLANTS, configurations

pytestmark = [
    pytest.mark.skipif(
        shutil.which("g++") is None or torch.version.cuda is not None,
        reason="stands in for CUDA where a CPU build of torch and g++ are",
    ),
    pytest.mark.timeout(900),
]

NAMED = [
    name
    for name in configurations()
    if not name.startswith(("{", "grouping", "recipe"))
][1::2]
"""Every other one; the heavy test has all."""


def faults_of(names, folder):
    """The errors of each configuration, in a process of its own with the shim."""
    report = folder / "faults.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.helpers.fake_steps",
        str(report),
        *names,
    ]
    environment = {**os.environ, "LD_PRELOAD": str(build_shim(folder))}
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True)
    faults = json.loads(report.read_text())
    return faults


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return faults_of([*PAIRS, *NAMED, *PLANTS], tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("name", [*PAIRS, *NAMED])
def test_a_step_places_every_tensor_and_waits_for_nothing(faults, name):
    assert not faults[name], faults[name]


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "misplaced table",
            r"a tensor \(\d+,\) on the host is among those on the device",
        ),
        ("item", "the host waits for the device: aten._local_scalar_dense"),
        ("blocking copy", r"\(1,\) is copied to the device and waited for"),
        (
            "copy that is not pinned",
            r"\(1,\) is copied to the device from memory that is not pinned",
        ),
    ],
)
def test_planted_faults_are_noticed(faults, name, message):
    assert re.search(f"Fault: {message}", faults[name]), faults[name]


@pytest.mark.heavy(seconds=70)
def test_every_combination_of_an_operator_every_grouping_and_every_recipe(tmp_path):
    names = configurations().keys() - {*PAIRS, *NAMED}
    assert not {
        name: fault
        for name, fault in faults_of(sorted(names), tmp_path).items()
        if fault
    }
