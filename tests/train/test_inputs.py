"""No input may lie in what a run writes or deletes, whichever way its name leads there."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from mora_ds.config.arguments import from_flat
from mora_ds.train.inputs import check_inputs
from tests.helpers.errors import user_error
from tests.helpers.snapshot import untouched
from tests.helpers.tables import each_row, parsed, rows

NAMED = """
{model_name_or_path: out/base} | --model_name_or_path out/base
{model_name_or_path: link} | --model_name_or_path link
{model_name_or_path: other/base} | --model_name_or_path other/base
{model_config: out/base/config.json} | --model_config
{tokenizer_name: out/tokenizer} | --tokenizer_name out/tokenizer
{train_files: [out/metrics.jsonl]} | --train_files out/metrics.jsonl
{train_files: [out/demo/text.txt]} | --train_files out/demo/text.txt
{train_files: [.]} | --train_files .
{train_files: ["out/*.jsonl"]} | --train_files out/metrics.jsonl
{train_files: ["a=text.txt:1", "b=out/ledger/*:1"]} | --train_files out/ledger/a.txt
{train_files: [text.txt], replay: ["a=out/ledger/a.txt:0.1"]} | --replay out/ledger/a.txt
{mixture: mix.yaml, train_files: []} | --mixture out/ledger/a.txt
{mixture: out/demo/mix.yaml, train_files: []} | --mixture out/demo/mix.yaml
{dataset_name: out/demo, train_files: []} | --dataset_name out/demo
{dataset_name: out/demo, train_files: [], streaming: true} | --dataset_name out/demo
{eval_files: [held=out/ledger/a.txt]} | --eval_files out/ledger/a.txt
{eval_tasks: [piqa, out/ledger/task.yaml]} | --eval_tasks out/ledger/task.yaml
{cache_dir: out/checkpoints/tokens} | --cache_dir out/checkpoints/tokens
{research: {targets: out/ledger/a.txt}} | research.targets out/ledger/a.txt
{deepspeed: out/base/ds.json} | --deepspeed out/base/ds.json
{model_name_or_path: out} | --model_name_or_path out
{model_name_or_path: other} | --model_name_or_path other
{tokenizer_name: other/../out} | --tokenizer_name other/../out
{train_files: ["out/r*"]} | --train_files out/r*
{train_files: ["other/s*"]} | --train_files other/s*
{train_files: ["*"]} | --train_files out
{train_files: ["./**/*.parquet"]} | --train_files ./**/*.parquet
{train_files: ["ou*/**/*.csv"]} | --train_files ou*/**/*.csv
{eval_files: [held=out]} | --eval_files out
{mixture: all.yaml, train_files: []} | --mixture .
"""

MIXTURE = "sources: {a: {files: [out/ledger/a.txt]}}\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working directory: an output folder with all that the cases name, and other names
    that lead into it.
    """
    monkeypatch.chdir(tmp_path)
    contents = {
        "out/base/pytorch_model.bin": "mine",
        "out/ledger/a.txt": "mine",
        "out/tokenizer/tokenizer.json": "mine",
        "out/metrics.jsonl": "mine",
        "out/demo/mix.yaml": MIXTURE.replace("out/ledger/a.txt", "text.txt"),
        "mix.yaml": MIXTURE,
        "all.yaml": MIXTURE.replace("out/ledger/a.txt", "."),
        "out/corpus.txt": "mine",
        "text.txt": "other",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "link").symlink_to("out/base")
    (tmp_path / "other").symlink_to("out")
    return tmp_path


def settings(changes):
    return from_flat(
        {
            "model_name_or_path": "facebook/opt-125m",
            "train_files": ["text.txt"],
            **changes,
        }
    )


@each_row("changes, message", NAMED)
def test_an_input_within_the_output_is_named(home, changes, message):
    with untouched(home), user_error(re.escape(message)) as refused:
        check_inputs(settings(parsed(changes)), Path("out"))
    assert "--output_dir out" in str(refused.value)


def test_a_pattern_that_would_match_a_new_output_folder_is_refused(home):
    with user_error(r"--train_files n\*"):
        check_inputs(settings({"train_files": ["n*"]}), Path("new"))


OTHERS = """
{}
{model_name_or_path: .}
{train_files: [out/corpus.txt]}
{train_files: ["out/c*.txt"]}
{train_files: [out/texts]}
{train_files: ["out/texts/**/*.txt"]}
{dataset_name: out/texts, train_files: []}
{mixture: out/mix.yaml, train_files: []}
{cache_dir: out}
{cache_dir: out/cache}
{research: {targets: out/plan.yaml}}
{train_files: ["no*"]}
{train_files: [looped]}
"""


@pytest.mark.parametrize("changes", OTHERS.strip().splitlines())
def test_other_inputs_pass(home, changes):
    """A folder of another name than those of a run is safe in the output folder, and the
    output folder in a model's; a loop of links leads nowhere.
    """
    (home / "looped").mkdir()
    (home / "looped/a.txt").symlink_to("a.txt")
    (home / "out/texts").mkdir()
    (home / "out/texts/a.txt").write_text("text")
    shutil.copy(home / "out/demo/mix.yaml", home / "out/mix.yaml")
    check_inputs(settings(parsed(changes)), Path("out"))


def test_a_resumed_run_may_read_its_base(home):
    (home / "out/run.yaml").write_text("seed: 1\nversions: {}\nresolved: {owns: []}\n")
    again = {"resume_from_checkpoint": "auto", "deepspeed": None}
    check_inputs(settings({"model_name_or_path": "out/base", **again}), Path("out"))
    check_inputs(settings({"train_files": ["out/demo/text.txt"], **again}), Path("out"))
    with user_error("--tokenizer_name"):
        check_inputs(
            settings({"tokenizer_name": "out/tokenizer", **again}), Path("out")
        )


def test_every_setting_that_names_a_file_is_looked_at():
    """Whoever adds one must decide whether it is an input."""
    groups = vars(settings({})).values()
    fields = {
        name
        for group in groups
        if dataclasses.is_dataclass(group)
        for name in vars(group)
    }
    ends = "_(dir|files?|name|path|checkpoint|config|adapter)$|deepspeed$|mixture$"
    outputs = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}
    named = {name for changes, _ in rows(NAMED) for name in parsed(changes)}
    assert {name for name in fields if re.search(ends, name)} - outputs <= named
