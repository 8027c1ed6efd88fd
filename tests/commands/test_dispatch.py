"""`mora-ds COMMAND`: which function runs, on which flags, and who starts the processes of a
training.
"""

import os
import sys
from contextlib import nullcontext, suppress

from deepspeed.launcher import runner

from mora_ds.commands import dispatch, pretrain, recipes
from mora_ds.common.files import CONFIGS, packaged
from mora_ds.config.arguments import parse
from mora_ds.engine import launcher
from tests.helpers.errors import user_error
from tests.helpers.jobs import REPOSITORY
from tests.helpers.mistakes import answer
from tests.helpers.tables import each_row, parsed


def test_a_launcher_may_put_its_local_rank_first():
    argv = ["/bin/mora-ds", "--local_rank=1", "pretrain", "recipe.yaml", "--seed", "3"]
    assert dispatch.take_command(argv) == "pretrain"
    assert argv == [
        "mora-ds pretrain",
        *["--local_rank=1", "recipe.yaml", "--seed", "3"],
    ]
    assert dispatch.take_command(["mora-ds"]) == ""


def test_every_command_has_its_function_and_the_list_names_it():
    shown = "\n".join(dispatch.help_lines())
    for name in dispatch.COMMANDS:
        assert callable(dispatch.load(name))
        assert f"  {name} " in shown


def test_a_command_reads_the_flags_after_its_name(capsys):
    code, message = answer(lambda: dispatch.run("verify"), "mora-ds", ["/nowhere"])
    assert code == 2, message
    assert answer(lambda: dispatch.run("export"), "mora-ds export", ["--help"])[0] == 0
    assert capsys.readouterr().out.startswith("usage: mora-ds export ")
    code, message = answer(lambda: dispatch.run("exprot"), "mora-ds", [])
    assert code == 2
    assert "Did you mean 'export'?" in message


# -- the package's own recipes ---------------------------------------------------------
def test_the_recipes_of_the_package_are_those_of_the_checkout():
    assert CONFIGS.resolve() == REPOSITORY / "configs"


def test_a_path_under_configs_is_found_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The recipe names configs/zero3.json
    words = (
        "configs/recipes/continual.yaml --seed 3 --mixture configs/mixtures/two_domains.yaml "
        "--model_config configs/models/tiny_llama.json"
    )
    arguments = parse(words.split())
    assert arguments.training.deepspeed == str(CONFIGS / "zero3.json")
    assert arguments.training.seed == 3
    assert arguments.data.mixture == str(CONFIGS / "mixtures/two_domains.yaml")
    assert arguments.model.model_config == str(CONFIGS / "models/tiny_llama.json")
    with user_error("configs/recipes/gone"):
        parse(["configs/recipes/gone.yaml"])
    local_file = tmp_path / "configs/zero3.json"
    local_file.parent.mkdir()
    local_file.write_text("{}")
    assert packaged("configs/zero3.json") == "configs/zero3.json", (
        "a file of the user's comes first"
    )


def test_recipes_are_listed_and_copied(tmp_path, capsys):
    assert answer(recipes.main, "mora-ds recipes", []) == (0, "")
    assert "configs/recipes/continual.yaml\n" in capsys.readouterr().out
    copy = tmp_path / "mine"
    assert answer(recipes.main, "mora-ds recipes", ["copy", str(copy)]) == (0, "")
    assert (copy / "recipes/continual.yaml").read_bytes() == (
        CONFIGS / "recipes/continual.yaml"
    ).read_bytes()
    code, message = answer(recipes.main, "mora-ds recipes", ["copy", str(copy)])
    assert code == 2
    assert str(copy) in message


# -- who starts the processes ----------------------------------------------------------
def test_launcher_flags_are_separated_from_the_others():
    words = "recipe.yaml --num_gpus 2 --eval_files a b --no_ssh --master_port=29501 --seed 3"
    launch_flags, remaining = launcher.launcher_flags(words.split())
    assert launch_flags == ["--num_gpus", "2", "--master_port", "29501", "--no_ssh"]
    assert remaining == ["recipe.yaml", "--eval_files", "a", "b", "--seed", "3"]
    with user_error("--num_gpus"):
        launcher.launcher_flags(["--num_gpus"])


def test_deepspeeds_launcher_has_these_flags_and_starts_a_module():
    # One is a number, a name and a path
    words = [f"--{name}=2" for name in launcher.VALUES]
    words += [f"--{name}" for name in launcher.SWITCHES]
    options = runner.parse_args(launcher.command(words, ["--num_gpus", "ours"])[3:])
    assert options.module
    assert options.user_script == "mora_ds"
    assert options.num_gpus == 2
    assert options.user_args == ["pretrain", "--num_gpus", "ours"]


STARTS = """
--num_gpus 2 --seed 3 | 0 | null | [--num_gpus, "2"]
--seed 3 | 8 | null | []
--seed 3 | 1 | null | null
# torchrun and srun have started it, or DeepSpeed's launcher
--seed 3 | 8 | "0" | null
--local_rank=0 --seed 3 | 8 | "0" | null
"""
"""Flags | GPUs | RANK | flags of the launcher, if one is started."""


@each_row("flags, gpus, rank, launched", STARTS)
def test_a_training_is_launched_once(flags, gpus, rank, launched, monkeypatch):
    for_launcher = parsed(launched)
    environment = {} if rank == "null" else {"RANK": parsed(rank)}
    calls = []
    monkeypatch.setattr(sys, "argv", ["mora-ds pretrain", *flags.split()])
    monkeypatch.setattr(pretrain, "accelerators", lambda: int(gpus))
    monkeypatch.setattr(pretrain, "run_launcher", lambda words: calls.append(words))
    monkeypatch.setattr(pretrain, "main", lambda: None)
    monkeypatch.setattr(os, "environ", environment)
    with suppress(SystemExit):
        pretrain.start()
    assert calls == (
        []
        if for_launcher is None
        else [launcher.command(for_launcher, ["--seed", "3"])]
    )
    is_alone = for_launcher is None and rank == "null" and flags == "--seed 3"
    assert ("MASTER_PORT" in environment) == is_alone


CONNECTIONS = """
pdsh ssh | --hostfile {hosts} | ok
ssh | --hostfile {hosts} | pdsh not found
"" | --hostfile {hosts} --master_port 1 | pdsh and ssh not found
"" | --hostfile {hosts} --no_ssh | ok
"" | --hostfile {hosts} --num_nodes 1 | ok
"" | --hostfile {one_host} | ok
"" | --hostfile {gone} | ok
"" | --num_gpus 2 | ok
"""
"""Installed programs | flags of the launcher | what is said of them."""


@each_row("installed, flags, said", CONNECTIONS)
def test_what_ssh_to_other_nodes_needs_is_named(
    installed, flags, said, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in installed.replace('"', "").split():
        (tmp_path / name).touch(0o755)
    hosts = tmp_path / "hosts"
    one_host = tmp_path / "one_host"
    hosts.write_text("a slots=1\nb slots=1\n")
    one_host.write_text("# two\na slots=1\n\n")
    line = flags.format(hosts=hosts, one_host=one_host, gone=tmp_path / "gone")
    expected = nullcontext()
    if said != "ok":
        expected = user_error(f"--hostfile: {said}.*apt install pdsh.*--no_ssh")
    with expected:
        launcher.check_connections(line.split())


LEVELS = """
--num_gpus 2     | --seed 1                   | error
--hostfile nodes | --seed 1                   | warning
--num_gpus 2     | --seed 1 --log_level debug | debug
--num_gpus 2     | --log_level chatty         | error
"""


@each_row("for_launcher, flags, level", LEVELS)
def test_the_launcher_is_quiet_unless_it_is_asked(for_launcher, flags, level):
    command = launcher.command(for_launcher.split(), flags.split())
    assert runner.parse_args(command[3:]).log_level == level
