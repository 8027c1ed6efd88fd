"""The main job as users run it: one curve for any number of ranks, every kind of input and
setting, the export.
"""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from mora_ds.checkpoint.state import TrainerState
from mora_ds.common.files import read_json
from mora_ds.config.training import TrainingArguments
from mora_ds.data import (
    PackedDataset,
    build_cache,
    load_corpus,
)
from mora_ds.deploy.export import export_merged
from mora_ds.models.loss import token_nll
from mora_ds.train.pretrain import _total_steps
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import (
    REPOSITORY,
    ZERO3,
    assert_close_losses,
    finished_run,
    job,
    launch,
    losses,
    rows,
    run,
)
from tests.helpers.tables import parsed
from tests.helpers.tables import rows as rows_of

MERGING = "--merge_every 3 --restart_warmup_steps 1 --max_steps 8 --eval_steps 4"


def perplexities(out):
    return [
        (row["step"], row["eval_perplexity"])
        for row in rows(out)
        if "eval_perplexity" in row
    ]


def assert_close_evals(one, reference):
    for (step, perplexity), (expected_step, expected) in zip(
        perplexities(one), perplexities(reference), strict=True
    ):
        assert step == expected_step
        assert perplexity == pytest.approx(expected, rel=1e-5)


# -- one curve -------------------------------------------------------------------------


def test_the_curve_is_the_same_for_1_2_and_3_ranks_and_any_accumulation(user, tmp_path):
    """12 sequences a step, shared out in four ways, with two merges, embeddings and norms
    trained too.
    """
    more = f"{MERGING} --train_embeddings true --train_norms true --learning_rate 5e-3"
    shares = [(1, 12, 1), (1, 3, 4), (2, 3, 2), (3, 4, 1)]
    outs = []
    for ranks, micro, accumulation in shares:
        out = tmp_path / f"{ranks}-{micro}-{accumulation}"
        batch = (
            f"--per_device_train_batch_size {micro} --per_device_eval_batch_size {micro} "
            f"--gradient_accumulation_steps {accumulation}"
        )
        summary = run(ranks, user.flags(out, more, batch))
        assert summary["merges"] == 2
        assert summary["base_bytes_gathered"] == 0
        outs.append(out)
    reference, *remaining = outs
    assert losses(reference)[-1] < losses(reference)[0] - 0.05, "it learns"
    for out in remaining:
        assert_close_losses(out, reference, rtol=2e-6)
        assert_close_evals(out, reference)
        mora_matrices, expected = (
            load_file(path / "checkpoints/latest/adapter.safetensors")
            for path in (out, reference)
        )
        for name in expected:
            assert_close(mora_matrices[name], expected[name], rtol=1e-3, atol=2e-5)


# -- the control -----------------------------------------------------------------------


def test_full_training_under_zero3_with_export_and_resume(user, tmp_path, merged):
    more = "--adapter full --max_steps 6 --save_steps 3 --learning_rate 1e-3"
    one = tmp_path / "one"
    two = tmp_path / "two"
    run(1, user.flags(one, more, "--per_device_train_batch_size 4"))
    summary = run(2, user.flags(two, more))
    with user_error(r"--adapter full.* resume the run with --export_merged"):
        export_merged(two, merged)
    run(2, user.flags(two, more, "--resume_from_checkpoint auto --export_merged true"))
    with user_error(rf"--adapter full.* {two}/merged is its model"):
        export_merged(two / "checkpoints/step-000003", merged)
    assert summary["trainable_params"] == summary["total_params"]
    assert_close_losses(two, one)
    model = AutoModelForCausalLM.from_pretrained(two / "merged")
    tokenizer = AutoTokenizer.from_pretrained(two / "merged")
    cache = build_cache(load_corpus([str(user.held)]), tokenizer, tmp_path / "cache")
    data = PackedDataset(cache, 32)
    batch = next(data.eval_batches(0, 1, data.n_blocks))
    predicted = int((batch["labels"] != -100).sum())
    with torch.no_grad():
        perplexity = (
            torch.tensor(token_nll(model, batch).item() / predicted).exp().item()
        )
    assert perplexity == pytest.approx(summary["perplexity_after"]["held"], rel=1e-5)
    again = tmp_path / "again"
    checkpoint = two / "checkpoints/step-000003"
    assert TrainerState.read(checkpoint).identity["seed"] == 42
    run(2, user.flags(again, more, "--resume_from_checkpoint", checkpoint))
    assert torch.equal(losses(again), losses(two)[3:])


# -- where text and model come from ----------------------------------------------------


def test_a_fresh_model_with_a_tokenizer_trained_on_the_corpus(user, tmp_path, out):
    argv = user.flags(
        out,
        "--save_steps 3 --merge_every 2 --restart_warmup_steps 1 --train_embeddings true",
        "--train_tokenizer_vocab 420",
    )
    at = argv.index("--model_name_or_path")
    config = REPOSITORY / "configs/models/tiny_llama.json"
    argv[at : at + 2] = ["--model_config", str(config)]
    run(1, [*argv, "--export_merged", "true"])
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    assert model.config.vocab_size == 420 == len(tokenizer)
    export_merged(out / "checkpoints/latest", tmp_path / "verified", verify=True)
    reference = losses(out)
    tokenizer_file = out / "tokenizer/tokenizer.model"
    written = tokenizer_file.stat().st_mtime_ns
    shutil.rmtree(out / "checkpoints/step-000006")
    run(1, [*argv, "--resume_from_checkpoint", "auto"])
    assert torch.equal(losses(out), reference)
    assert tokenizer_file.stat().st_mtime_ns == written, "trained once"


def test_epochs_in_place_of_steps(user, out):
    """Every block once an epoch, rounded up to whole steps."""
    epochs = "--max_steps -1 --num_train_epochs 1 --per_device_train_batch_size 16"
    summary = run(1, user.flags(out, epochs))
    assert summary["tokens"] == summary["steps"] * 16 * 32
    resolved = yaml.safe_load((out / "run.yaml").read_text())["resolved"]
    assert resolved["steps"] == summary["steps"]


EPOCHS = """
1.0 | 32 | 1 | 8
0.5 | 32 | 1 | 4
0.5 | 33 | 1 | 5
1.1 | 40 | 1 | 11
1.1 | 40 | 2 | 6
0.01 | 32 | 1 | 1
"""
"""Epochs | blocks | ranks | steps, rounded up."""


@pytest.mark.parametrize("row", rows_of(EPOCHS), ids=" ".join)
def test_parts_of_an_epoch(row):
    """1.1 times 10 is more than 11 in floating point, which must not cost a step."""
    epochs, blocks, ranks, steps = map(parsed, row)
    training = TrainingArguments(
        max_steps=-1, num_train_epochs=epochs, per_device_train_batch_size=4
    )
    data = SimpleNamespace(n_blocks=blocks, max_steps=None)
    assert _total_steps(training, data, ranks, done=0) == steps


# -- settings --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(user, tmp_path_factory):
    """The run that settings which only change how it is computed must repeat."""
    return finished_run(
        1, user, tmp_path_factory, MERGING, "--per_device_train_batch_size 4"
    )


def test_documents_are_those_of_another_format_and_see_each_other_without_a_mask(
    user, plain, out, tmp_path
):
    """Other formats give the same documents: tests/data/test_readers.py."""
    pyarrow.parquet.write_table(
        pyarrow.table({"body": user.texts()}), tmp_path / "a.parquet"
    )
    files = ("--text_column body --train_files", tmp_path / "*.parquet")
    same = (MERGING, "--per_device_train_batch_size 4", *files)
    run(1, user.flags(out, *same))
    assert torch.equal(losses(out), losses(plain))
    run(1, user.flags(out, *same, "--no_document_mask --overwrite_output_dir true"))
    assert not torch.equal(losses(out), losses(plain))


@pytest.mark.parametrize(
    "config, checkpointing",
    [("zero1", False), ("zero2", True), ("zero3_offload_optimizer", False)],
)
def test_how_it_is_computed_changes_nothing(user, plain, out, config, checkpointing):
    how = ("--deepspeed", REPOSITORY / f"configs/{config}.json")
    run(2, user.flags(out, MERGING, *how, "--gradient_checkpointing", checkpointing))
    assert_close_losses(out, plain, rtol=2e-6)
    assert_close_evals(out, plain)


# -- as users call it ------------------------------------------------------------------


FIRST_LINES = r"""
model       llama, .*
trained     .* parameters \(.* MoRA of rank 2.*
data        2 sequences of 32 tokens, 64 tokens per step
steps       4 \(256 tokens\)
epochs      train 0.01
memory      """
LAST_LINES = r"""
done        4 steps, 256 tokens in 0:0.*
checkpoint  my run/checkpoints/step-000004(.*\n)+serve       vllm serve 'my run/merged'"""


def assert_fit_for_reading(done):
    """The run of the recipe below: what a person reads before its first step and after its
    last, no bar in a file, and no line that a terminal would break."""
    before, _, after = done.stdout.partition("step 4/4")
    assert re.search(FIRST_LINES, before), before
    assert re.search(LAST_LINES, after), after
    assert "tokeni" not in done.stderr
    # Others are the launcher's
    own_lines = [
        line for line in done.stdout.splitlines() if not line.startswith("[20")
    ]
    assert not [line for line in own_lines if len(line) > 120]


def test_recipe_flags_and_run_yaml(user, tmp_path, monkeypatch):
    """A recipe with relative paths, flags over it, in a folder with a space in its name;
    then run.yaml as a recipe.
    """
    folder = tmp_path / "my work"
    shutil.copytree(user.model, folder / "a model")
    shutil.copy(user.train, folder / "some text.jsonl")
    recipe = {
        "deepspeed": str(REPOSITORY / "configs/zero3.json"),
        "model_name_or_path": "a model",
        "max_steps": 4,
        "train_files": ["some text.jsonl"],
        "output_dir": "my run",
        "cache_dir": "cache",
        "mora_rank": 4,
        "seq_len": 32,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-2",
        "compute": "weight",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = launch(
        1, ["recipe.yaml", "--mora_rank", "2", "--export_merged", "true"], folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_fit_for_reading(done)
    first = folder / "my run"
    written = yaml.safe_load((first / "run.yaml").read_text())
    assert {"mora_rank": 2, "max_steps": 4}.items() <= written.items()
    assert written["resolved"]["world_size"] == 1
    assert written["versions"]["deepspeed"]
    assert (
        AutoModelForCausalLM.from_pretrained(first / "merged").config.vocab_size == 400
    )
    again = folder / "again"
    monkeypatch.chdir(folder)
    run(1, [str(first / "run.yaml"), "--output_dir", str(again)])
    assert torch.equal(losses(again), losses(first))


def job_with_home(home, argv):
    os.environ["HOME"] = home
    return job(argv)


def test_a_tilde_is_expanded_where_no_shell_has_done_it(user, tmp_path, model_folder):
    """Examples: a value in a YAML recipe, or behind --flag=~/..."""
    shutil.copytree(user.model, model_folder)
    shutil.copy(user.train, tmp_path / "train.jsonl")
    shutil.copy(ZERO3, tmp_path)
    argv = user.flags(
        "~/out",
        "--cache_dir ~/cache --model_name_or_path ~/model --train_files ~/train.jsonl",
        "--deepspeed ~/zero3.json --save_steps 3",
    )
    run_alone(job_with_home, str(tmp_path), argv)
    assert (tmp_path / "out/summary.json").is_file()
    assert (tmp_path / "cache").is_dir()
    resume = ["--resume_from_checkpoint", "~/out/checkpoints/step-000003"]
    run_alone(job_with_home, str(tmp_path), [*argv, *resume])
    assert not Path("~").exists()


def test_summary_and_files_of_a_run(plain):
    summary = read_json(plain / "summary.json")
    assert {
        "steps",
        "tokens",
        "trainable_params",
        "total_params",
        "merges",
        "perplexity_before",
        "perplexity_after",
        "perplexity_change_percent",
        "bytes_gathered_per_step",
        "base_bytes_gathered",
        "peak_memory_bytes",
    } <= summary.keys()
    assert (summary["steps"], summary["tokens"], summary["merges"]) == (
        8,
        8 * 4 * 32,
        2,
    )
    for when in ("before", "after"):
        assert summary[f"perplexity_{when}"].keys() == {"held", "short"}
    written = (
        "run.yaml metrics.jsonl summary.json tensorboard checkpoints ledger tokenizer"
    )
    assert {path.name for path in plain.iterdir()} == {*written.split(), ".lock"}
    assert len(losses(plain)) == 8
    assert [step for step, _ in perplexities(plain)] == [0, 4, 8]
