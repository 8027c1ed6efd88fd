"""What earlier versions wrote or understood: run.yaml of 0.2, renamed flags, retired settings."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import RECORDED_KEYS, dump, parse
from mora_ds.config.flags import BEFORE, RENAMED, RETIRED
from mora_ds.config.validate import validate

RUN_OF_0_2 = Path(__file__).with_name("run_of_0_2.yaml")
"""Written by version 0.2 at the end of the demo, with every setting that it had."""


def test_run_yaml_of_0_2_repeats_its_run() -> None:
    arguments = parse([str(RUN_OF_0_2)])
    validate(arguments)
    written = yaml.safe_load(RUN_OF_0_2.read_text(encoding="utf-8"))
    settings = {RENAMED.get(key, key): value for key, value in written.items() if key not in (*RECORDED_KEYS, *RETIRED)}
    assert len(settings) > 100 and settings.keys() | BEFORE.keys() == arguments.given
    assert dump(arguments).items() >= {**settings, **BEFORE}.items()


def test_a_run_yaml_repeats_what_runs_did_before_a_setting_existed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mora_rank: 16\n", encoding="utf-8")
    assert parse([str(recipe)]).model.attention == "auto", "a recipe that no run has written"
    recipe.write_text("mora_rank: 16\nattention: documents\nversions: {}\nresolved: {}\n", encoding="utf-8")
    assert parse([str(recipe)]).model.attention == "documents"
    assert parse([str(RUN_OF_0_2), "--attention", "auto"]).model.attention == "auto"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("mora_ds"), "propagate", True)
    return caplog


@pytest.mark.parametrize("form", ["--peer_silence_s 7", "--peer-silence-s=7", "recipe"])
def test_an_old_name_is_accepted_and_the_present_one_said_once(
    form: str, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    recipe = tmp_path / "old.yaml"
    recipe.write_text("peer_silence_s: 7\n", encoding="utf-8")
    arguments = parse([str(recipe)] if form == "recipe" else form.split())
    assert arguments.training.heartbeat_timeout_s == 7 and arguments.given == {"heartbeat_timeout_s"}
    assert [record.getMessage() for record in warnings.records] == [
        "--peer_silence_s is called --heartbeat_timeout_s now; the old name still works"
    ]


def test_both_names_of_a_setting_in_one_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "both.yaml"
    recipe.write_text("heartbeat_timeout_s: 7\npeer_silence_s: 8\n", encoding="utf-8")
    with pytest.raises(UserError, match="peer_silence_s and heartbeat_timeout_s are one setting: give one of them"):
        parse([str(recipe)])


@pytest.mark.parametrize("name", RETIRED)
def test_a_retired_setting_has_one_value_left(name: str, tmp_path: Path) -> None:
    accepted, recipe = RETIRED[name].value, tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({name: accepted}), encoding="utf-8")
    assert parse([str(recipe), f"--{name}", str(accepted)]).given == frozenset()
    other = True if accepted is False else "incremental"
    recipe.write_text(yaml.safe_dump({name: other}), encoding="utf-8")
    for argv in ([str(recipe)], [f"--{name}", str(other)], [f"--{name}={other}"]):
        with pytest.raises(UserError, match=rf"{name}: .*leave out"):
            parse(argv)


def test_retired_settings_are_not_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["-h"])
    assert not any(name in capsys.readouterr().out for name in (*RETIRED, *RENAMED))
