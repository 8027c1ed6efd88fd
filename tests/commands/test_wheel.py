"""A wheel in an environment of its own and an empty folder: every command, the demo,
nothing read from the checkout.
"""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mora_ds.commands.dispatch import COMMANDS
from mora_ds.common.version import __version__
from tests.helpers.gloo import free_port
from tests.helpers.jobs import REPOSITORY, rows
from tests.helpers.tools import called

pytestmark = [pytest.mark.heavy(seconds=15), pytest.mark.timeout(600)]

WATCH = """
import os, sys

def refuse(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.realpath(arguments[0])
        if path.startswith({folders!r}):
            sys.stderr.write("READ FROM THE CHECKOUT: " + path + "\\n")
            os._exit(99)

sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The bin folder of an environment with the wheel, and the packages that this one
    has.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("mora_ds", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    ]
    subprocess.run(build, check=True)
    environment = folder / "environment"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True
    )
    (wheel,) = folder.glob("*.whl")
    python = environment / "bin/python"
    subprocess.run(
        [
            *pip,
            "--python",
            python,
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            wheel,
        ],
        check=True,
    )
    (site,) = (environment / "lib").glob("python*/site-packages")
    installed = {
        Path(import_module(name).__file__ or "").parents[1]
        for name in ("torch", "deepspeed", "transformers")
    }
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in installed))
    watched = tuple(
        f"{REPOSITORY / name}{os.sep}"
        for name in ("mora_ds", "configs", "launch", "tools", "tests")
    )
    (site / "watch_opens.py").write_text(WATCH.format(folders=watched))
    (site / "watch.pth").write_text("import watch_opens\n")
    return environment / "bin"


def call(programs, folder, *words):
    """What a program of the environment prints, started in `folder`."""
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    program = programs / str(words[0])
    done = called(
        [str(program), *map(str, words[1:])], cwd=folder, env=environment, timeout=500
    )
    assert done.returncode == 0, (
        f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def test_the_watch_notices_the_checkout(programs, tmp_path):
    with pytest.raises(AssertionError, match="READ FROM THE CHECKOUT"):
        call(
            programs,
            tmp_path,
            "python",
            "-c",
            f"open({str(REPOSITORY / 'configs' / 'zero3.json')!r})",
        )


def test_the_wheel_is_what_runs(programs, tmp_path):
    location = call(
        programs, tmp_path, "python", "-c", "import mora_ds; print(mora_ds.__file__)"
    )
    assert Path(location.strip()).is_relative_to(programs.parent)
    assert (Path(location.strip()).parent / "py.typed").is_file()
    assert (
        call(programs, tmp_path, "mora-ds", "--version") == f"mora_ds {__version__}\n"
    )
    assert call(programs, tmp_path, "python", "-m", "mora_ds") == call(
        programs, tmp_path, "mora-ds", "--help"
    )


def test_the_wheel_has_what_every_command_imports(programs, tmp_path):
    program = "from mora_ds.commands.dispatch import COMMANDS, load; print(*(name for name in COMMANDS if load(name)))"
    assert call(programs, tmp_path, "python", "-c", program).split() == list(COMMANDS)
    assert call(programs, tmp_path, "mora-ds", "plan", "--help").startswith(
        "usage: mora-ds plan "
    )


def test_the_demo_runs_and_its_checkpoint_is_used(programs, tmp_path, out):
    """DeepSpeed's launcher starts two processes from the package; the recipe is the
    package's own."""
    flags = (
        f"--num_gpus 2 --master_port {free_port()} --deepspeed configs/zero3.json --max_steps 6 "
        "--merge_every 3 --restart_warmup_steps 1 --warmup_steps 1 --eval_steps 6"
    )
    call(programs, tmp_path, "mora-ds", "pretrain", *flags.split())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert rows(out)[-1]["step"] == 6
    call(programs, tmp_path, "mora-ds", "verify", "out")
    export = "export --checkpoint out --output merged --verify"
    call(programs, tmp_path, "mora-ds", *export.split())
    assert (tmp_path / "merged/model.safetensors").is_file()
