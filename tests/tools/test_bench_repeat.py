"""tools/bench/repeat.py: a table is made by the command of its JSON."""

import json
import sys

import pytest

from mora_ds.common.files import read_json
from tests.helpers.errors import user_error
from tests.helpers.jobs import REPOSITORY
from tests.helpers.tools import call, tool
from tools.plans import DATA

MEMORIZATION = "python tools/bench/memorization.py"
REPEATED = (
    "learning_135m_long",
    "learning_135m_pilot",
    "memorization_135m",
    "memorization_gemma",
)


@pytest.fixture
def bench():
    return tool("bench/repeat")


def test_the_command_runs_and_the_published_table_comes_last(
    tmp_path, user, bench, monkeypatch, capsys
):
    flags = f"--base {user.model} --pairs 2 --batch 2 --micro_batch 2 --steps 24"
    published = {
        "command": f"{MEMORIZATION} {flags} --seeds 1 --methods mora@1e-2",
        "tables": {"memorization": [["method", "40"], ["mora", "published"]]},
    }
    (tmp_path / "toy.json").write_text(json.dumps(published))
    monkeypatch.setattr(bench, "DATA", tmp_path)
    monkeypatch.setattr(sys, "argv", ["repeat", "toy", "--folder", str(tmp_path / "a")])
    bench.main()
    (run,) = read_json(tmp_path / "a/toy.json")["runs"]
    assert (run["method"], run["learning_rate"]) == ("mora", 0.01)
    assert (tmp_path / "a/toy/results/mora-r8-0.01-1.json").is_file()
    assert capsys.readouterr().out.splitlines()[-1].split() == ["mora", "published"]


def test_a_table_that_cannot_be_repeated_is_refused(bench):
    for command, message in (
        (f"{MEMORIZATION} --with a.json", "of several commands"),
        ("python tools/bench/plan.py", "not of a learning bench"),
        ("", "not of a learning bench"),
        (f"{MEMORIZATION} --base out/fetched/gone", "there is no out/fetched/gone"),
    ):
        with user_error(message):
            bench.words_of(command)
    with user_error("unknown TABLE 'learning_135m_lon'"):
        call("bench/repeat", "learning_135m_lon")


@pytest.mark.parametrize("name", REPEATED)
def test_published_tables_of_pretrained_models_can_be_repeated(
    name, bench, monkeypatch, tmp_path
):
    """Their commands read nothing but what pretrained.py makes."""
    made = (SMOLLM2, GEMMA3, *(f"{text}.jsonl" for text in TEXTS), *TASKS)
    for file in made:
        path = tmp_path / bench.FETCHED / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    script, *words = bench.words_of(read_json(DATA / f"{name}.json")["command"])
    files = [word for word in words if "/" in word]
    ours = [word for word in files if not word.startswith(bench.FETCHED)]
    assert files != ours
    assert all((REPOSITORY / word).is_file() for word in (script, *ours))


SMOLLM2 = "smollm2-135m"
GEMMA3 = "gemma3-270m"
TEXTS = ("hpo", "hpo_held", "prose", "prose_held")
TASKS = ("hpo_trained.yaml", "hpo_held.yaml")
