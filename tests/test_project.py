"""The files that a code host reads say what the project itself does."""

import configparser
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_ci_runs_on_every_supported_python():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    versions = [
        word
        for line in setup["metadata"]["classifiers"].splitlines()
        for word in line.split()
        if "3." in word
    ]
    workflow = read(".github/workflows/checks.yml")
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == versions
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert workflow[True] == {"push": {"branches": ["main"]}, "pull_request": None}, (
        "YAML 1.1 reads `on` as true"
    )


def test_pre_commit_runs_the_linters_of_ci():
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    commands = {hook["entry"].removesuffix(" --fix") for hook in repository["hooks"]}
    landing = (ROOT / ".ci/run").read_text()
    linters = ("ruff", "mypy", "codespell")
    lines = [
        line.removeprefix(".venv/bin/")
        for line in landing.splitlines()
        if line.startswith(".venv/bin/")
    ]
    wanted = {
        line.removesuffix(" .").removesuffix(" --check")
        for line in lines
        if line.split()[0] in linters
    }
    assert commands == wanted
