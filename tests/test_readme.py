"""What the README shows must run: the script of its own loop as printed, in two ranks and in
one process; its two commands are those of .ci/run.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mora_ds
from tests.helpers.gloo import free_port, run_ranks
from tests.helpers.pages import ROOT, code_with
from tests.helpers.tools import called


def script(model):
    """The README's script, with the one line changed that a reader changes."""
    code = code_with("mora_ds.inject")
    changed, count = re.subn("^MODEL = .*", f"MODEL = {str(model)!r}", code, flags=re.M)
    assert count == 1
    return changed


def run_script(folder, model):
    os.chdir(folder)
    names = {}
    exec(script(model), names)
    return names["run"].remora.cycle, names["step"]


@pytest.fixture(scope="module")
def plugin_run(user, tmp_path_factory):
    """The folder in which the script has run, and its steps."""
    folder = tmp_path_factory.mktemp("plugin")
    (cycles, steps), other = run_ranks(2, run_script, str(folder), str(user.model))
    assert (cycles, steps) == other
    assert cycles == steps // 4 > 1
    return folder, steps


def test_the_script_merges_saves_and_exports(plugin_run):
    folder, _ = plugin_run
    assert len(code_with("mora_ds.inject").splitlines()) <= 24
    assert (folder / "merged/model.safetensors").is_file()


@pytest.mark.heavy(seconds=60)
@pytest.mark.parametrize(
    "program", ["deepspeed --num_gpus 2 --master_port {}", "python"]
)
def test_the_script_starts_as_the_readme_says(user, tmp_path, program):
    (tmp_path / "train.py").write_text(script(user.model))
    program, *flags = program.format(free_port()).split()
    words = [Path(sys.executable).with_name(program), *flags, "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = called(words, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "verification passed" in done.stdout
    assert (tmp_path / "merged/model.safetensors").is_file()


def resumed_run(folder, base):
    """A second process: refused without `resume`, back at its place with it."""
    os.chdir(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    mora_ds.inject(model, mora_ds.MoRAConfig(rank=8))
    engine, *_ = mora_ds.initialize(model=model, config=mora_ds.config_path("zero3"))
    try:
        mora_ds.Run(engine, base=base, folder="out")
    except mora_ds.UserError as error:
        assert "another run" in str(error)
    else:
        raise AssertionError("a folder that holds a run was taken")
    run = mora_ds.Run(engine, base=base, folder="out", resume="auto")
    frozen = AutoModelForCausalLM.from_pretrained(base).state_dict()
    moved = any(
        not torch.equal(layer.weight, frozen[f"{name}.weight"])
        for name, layer in mora_ds.mora_layers(model).items()
    )
    return run.state.step, moved


def test_a_run_of_ones_own_resumes(user, plugin_run):
    folder, steps = plugin_run
    resumed = run_ranks(2, resumed_run, str(folder), str(user.model))
    assert resumed == [(steps, True), (steps, True)]


def test_the_second_command_is_that_of_a_landing():
    """It runs the default tests; the first one is the demo, which .ci/run runs too."""
    block = code_with("pip install", language="bash")
    main_job, tests = block.splitlines()
    landing = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines()]
    assert tests in landing
    for line in (main_job, tests):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
