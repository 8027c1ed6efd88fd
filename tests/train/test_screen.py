"""The output of a run after its last step, by its settings; a launched run's lines are
in test_pretrain.py."""

import re
import shlex
from dataclasses import replace

from transformers import AutoModelForCausalLM

from mora_ds.config.arguments import parse
from mora_ds.train import screen
from mora_ds.train.screen import closing
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import printed
from tests.helpers.tables import each_row

SUMMARY = {"steps": 1200, "tokens": 2_400_000}


LAST = """
--adapter mora | done checkpoint curves evaluate export serve
--export_merged | done checkpoint curves evaluate serve
--adapter full --report_to none | done checkpoint
--adapter none | done
"""


@each_row("flags, labels", LAST)
def test_the_last_lines_name_the_commands_that_work_now(flags, labels):
    lines = closing(
        parse(["--output_dir", "runs/law", *flags.split()]), SUMMARY, 3723.4
    )
    assert [line.split()[0] for line in lines] == labels.split()
    assert lines[0].endswith("in 1:02:03")


def test_the_next_commands_have_the_paths_of_the_run():
    arguments = parse(["--output_dir", "runs/law"])
    lines = closing(arguments, SUMMARY, 1)
    assert lines[0] == "done        1,200 steps, 2,400,000 tokens in 0:00:01"
    command = "mora-ds export --checkpoint runs/law/checkpoints/latest --output runs/law/merged"
    assert lines[-2] == f"export      {command}"
    with_domains = replace(arguments, research={"domain_adapters": True})
    assert closing(with_domains, SUMMARY, 1) == lines[:3], "no command for one model"


def test_the_next_commands_can_be_copied_into_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--output_dir", "~/a run", "--eval_files", "law=a b.txt"]
    lines = closing(parse(flags), SUMMARY, 1)
    checkpoint = f"{tmp_path}/a run/checkpoints/latest"
    merged = f"{tmp_path}/a run/merged"
    assert [shlex.split(line)[1:] for line in lines[-3:]] == [
        ["mora-ds", "evaluate", checkpoint, "--sets", "law=a b.txt"],
        ["mora-ds", "export", "--checkpoint", checkpoint, "--output", merged],
        ["vllm", "serve", merged],
    ]


def test_everything_that_is_trained_is_named():
    adapter = parse(
        ["--mora_rank", "4", "--train_new_embeddings", "--train_norms"]
    ).adapter
    assert (
        screen.names_of_trained(adapter)
        == "MoRA of rank 4, new rows of the embeddings, norms"
    )


def test_the_first_lines_have_the_base_without_adapter_and_the_epochs(user, out):
    """And say where a run is too short for its first merge."""
    output = run_alone(printed, user.flags(out, "--max_steps 2 --merge_every 20"))
    base = AutoModelForCausalLM.from_pretrained(user.model).num_parameters()
    assert f"llama, {base:,} parameters" in output
    assert re.search(r"epochs +train 0\.\d\d", output)
    assert "--merge_every 20: this run of 2 steps has no merge" in output
