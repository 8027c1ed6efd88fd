"""Mistakes of users: reported at once, by flag or file, with exit code 2 (1 while running); nothing is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mora_ds.checkpoint.folder import complete_checkpoints
from mora_ds.common.files import verify_manifest
from mora_ds.data import train_sentencepiece
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import REPOSITORY, Playground, environment, launch, losses, refused, run
from tests.helpers.models import tiny_model


def refused_each(cases: list[list[str]]) -> list[tuple[str, str]]:
    return [refused(argv) for argv in cases]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- settings ------------------------------------------------------------------------------------------------------

FLAGS: list[tuple[list[Any], list[str]]] = [
    (["--mora_rank", -4, "--seq_len", 1], ["--mora_rank must be at least 1", "--seq_len must be at least 2"]),
    (["--mora_rank", "eight"], ["--mora_rank", "eight"]),
    (["--mora_rnk", 8], ["--mora_rnk", "--mora_rank"]),
    (["--train_embeddings", "maybe"], ["--train_embeddings", "maybe"]),
    (["--target_modules", "q_prj"], ["--target_modules", "q_prj", "q_proj", "down_proj"]),
    (["--warmup_steps", 6], ["--warmup_steps 6", "6 steps"]),
    (["--max_steps", -1, "--warmup_steps", 5_000], ["--warmup_steps 5000"]),
    (["--seq_len", 129], ["--seq_len 129", "128 positions"]),
    (["--per_device_train_batch_size", 100_000], ["shorter than one batch", "--train_files", "100000"]),
    (["--deepspeed", "/nowhere/ds.json"], ["--deepspeed", "/nowhere/ds.json"]),
    (["--cache_dir", "/proc/nowhere"], ["--cache_dir", "/proc/nowhere"]),
    (["--output_dir", "/proc/nowhere"], ["--output_dir", "/proc/nowhere"]),
]
"""Mistakes that different parts of a run find; test_arguments.py has all that `validate` finds."""


def assert_user_errors(cases: list[list[str]], parts: list[list[str]]) -> None:
    """Each run of `cases` is refused with a message that has all of its `parts`."""
    results = run_ranks(1, refused_each, cases)[0]
    for argv, expected, (kind, message) in zip(cases, parts, results, strict=True):
        assert kind == "UserError" and all(part in message for part in expected), (argv, message)


@pytest.mark.gloo
def test_settings(user: Playground, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_user_errors([user.flags(out, *more) for more, _ in FLAGS], [parts for _, parts in FLAGS])
    assert not out.exists(), "nothing was written"


@pytest.mark.gloo
def test_recipes_and_deepspeed_files(user: Playground, tmp_path: Path) -> None:
    recipe, ds = tmp_path / "recipe.yaml", tmp_path / "ds.json"
    recipe.write_text("mora_rnak: 8\nmax_steps: many\n")
    ds.write_text(json.dumps({"zero_optimisation": {"stage": 3}, "train_micro_batch_size_per_gpu": 5,
                              "train_batch_size": 7, "optimizer": {"params": {"lr": 1.0}}}))  # fmt: skip
    torn = tmp_path / "torn.json"
    torn.write_text('{"zero_optimization": {"stage": 3,}\n')
    cases = [[str(recipe), *user.flags(tmp_path / "out")], user.flags(tmp_path / "out", "--deepspeed", ds),
             user.flags(tmp_path / "out", "--deepspeed", torn)]  # fmt: skip
    (_, first), (_, second), (_, third) = run_ranks(1, refused_each, cases)[0]
    for part in ("recipe.yaml", "mora_rnak", "mora_rank", "max_steps must be a whole number"):
        assert part in first
    for part in ("ds.json", "zero_optimisation", "zero_optimization", "--per_device_train_batch_size = 2",
                 "2 a process x 1 accumulated x 1 processes = 2", "--learning_rate"):  # fmt: skip
        assert part in second, "all contradictions at once"
    assert "torn.json, line 1" in third


# -- files ---------------------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, bytes]:
    files = {
        "empty.txt": b"",
        "blank.jsonl": b"\n\n",
        "latin.txt": "one\ntwo\nna\u00efve\n".encode("latin-1"),
        "latin.jsonl": b'{"text": "fine"}\n{"text": "na\xefve"}\n',
        "torn.jsonl": b'{"text": "fine"}\n{"text": "torn\n',
        "column.jsonl": b'{"txt": "fine"}\n',
        "short.txt": b"a",
        "archive.zip": b"PK",
        "late.txt": b"fine\n" * 400_000 + b"\xff\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return files


FILES = {
    "empty.txt": ["empty.txt is empty"],
    "blank.jsonl": ["blank.jsonl is empty"],
    "latin.txt": ["latin.txt, line 3", "not UTF-8"],
    "latin.jsonl": ["latin.jsonl, line 2", "not UTF-8"],
    "torn.jsonl": ["torn.jsonl, line 2", "broken JSON"],
    "column.jsonl": ["column.jsonl, line 1", "'text'", "txt", "--text_column"],
    "short.txt": ["shorter than one batch"],
    "archive.zip": ["archive.zip", "not read"],
    "late.txt": ["late.txt, line 400001", "not UTF-8"],
    "*.nothing": ["no file matches", "*.nothing"],
}


@pytest.mark.gloo
def test_files(user: Playground, tmp_path: Path) -> None:
    broken_files(tmp_path)
    out = tmp_path / "out"
    cases = [user.flags(out, "--train_files", tmp_path / name) for name in FILES]
    assert_user_errors(cases, [["--train_files", *parts] for parts in FILES.values()])
    cases = [user.flags(out, "--eval_files", tmp_path / name) for name in FILES if name != "short.txt"]
    assert_user_errors(cases, [["--eval_files"]] * len(cases))
    assert not out.exists()


@pytest.mark.gloo
def test_all_ranks_agree_on_a_broken_file(user: Playground, tmp_path: Path) -> None:
    broken_files(tmp_path)
    argv = user.flags(tmp_path / "out", "--train_files", tmp_path / "late.txt")
    for kind, message in run_ranks(2, refused, argv, timeout_s=60):
        assert kind == "UserError" and "late.txt, line 400001" in message


@pytest.mark.gloo
def test_a_read_only_cache(user: Playground, tmp_path: Path) -> None:
    """A run that finds all its tokens there succeeds; another one is told which flag to change."""
    cache = tmp_path / "cache"
    argv = user.flags(tmp_path / "out", "--cache_dir", cache)
    run(1, argv)
    bind = [["mount", "--bind", str(cache), str(cache)], ["mount", "-o", "remount,ro,bind", str(cache)]]
    if shutil.which("mount") is None or subprocess.run(bind[0], capture_output=True, check=False).returncode:
        pytest.skip("a read-only mount needs root")
    try:
        subprocess.run(bind[1], check=True)
        run(1, user.flags(tmp_path / "again", "--cache_dir", cache))
        new = shutil.copy(user.train, tmp_path / "new.jsonl")
        kind, message = run_ranks(
            1, refused, user.flags(tmp_path / "third", "--cache_dir", cache, "--train_files", new)
        )[0]
    finally:
        subprocess.run(["umount", str(cache)], check=True)
    assert kind == "UserError" and f"--cache_dir {cache} cannot be written to: Read-only file system" in message


# -- models and tokenizers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(user: Playground) -> dict[str, Path]:
    """Model folders with one thing wrong each."""
    root = user.root / "models"
    folders = {}
    for name in ("no_config", "no_weights", "no_tokenizer", "torn", "other_shape", "missing", "odd_type", "no_mask"):
        folders[name] = Path(shutil.copytree(user.model, root / name))
    (folders["no_config"] / "config.json").unlink()
    (folders["no_weights"] / "model.safetensors").unlink()
    for path in folders["no_tokenizer"].glob("tokenizer*"):
        path.unlink()
    weights = folders["torn"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((user.model / "config.json").read_text())
    (folders["other_shape"] / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    (folders["odd_type"] / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    tensors = load_file(folders["missing"] / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folders["missing"] / "model.safetensors", {"format": "pt"})
    bloom = AutoConfig.for_model("bloom", vocab_size=400, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(bloom).save_pretrained(folders["no_mask"])
    folders["file"] = user.train
    folders["nowhere"] = root / "nowhere"
    return folders


MODELS = {
    "no_config": ["no config.json"],
    "no_weights": ["model.safetensors"],
    "no_tokenizer": ["no tokenizer", "--tokenizer_name"],
    "torn": ["cannot be loaded"],
    "other_shape": ["weights do not fit the config", "mlp"],
    "missing": ["weights are missing", "up_proj"],
    "odd_type": ["lama"],
    "file": ["no such folder"],
    "nowhere": ["no such folder"],
}


@pytest.mark.gloo
def test_models(user: Playground, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases = [user.flags(out, "--model_name_or_path", models[name]) for name in MODELS]
    assert_user_errors(cases, [["--model_name_or_path", str(models[name]), *parts] for name, parts in MODELS.items()])
    assert not out.exists()


@pytest.mark.gloo
def test_documents_that_would_see_each_other(user: Playground, models: dict[str, Path], tmp_path: Path) -> None:
    argv = user.flags(tmp_path / "out", "--model_name_or_path", models["no_mask"])
    kind, message = run_ranks(1, refused, argv)[0]
    assert kind == "UserError" and "--no_document_mask" in message
    assert not (tmp_path / "out").exists()
    assert run(1, [*argv, "--no_document_mask"])["steps"] == 6


@pytest.mark.gloo
def test_a_tokenizer_beyond_the_models_vocabulary(user: Playground, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in user.train.read_text().splitlines()]
    path = train_sentencepiece(texts, 450, tmp_path)
    cases = [user.flags(tmp_path / "out", "--tokenizer_name", name) for name in (path, user.train)]
    assert_user_errors(cases, [["--tokenizer_name", "449", "0 to 399"], ["--tokenizer_name", str(user.train)]])


@pytest.mark.gloo
def test_a_tokenizer_that_would_come_back_as_another_one(user: Playground, tmp_path: Path) -> None:
    """A Qwen2 folder makes transformers read any tokenizer beside it as Qwen2's own."""
    shutil.copytree(user.model, tmp_path / "model")
    tiny_model("qwen2", vocab_size=400).save_pretrained(tmp_path / "model")
    texts = [json.loads(line)["text"] for line in user.train.read_text().splitlines()]
    path = train_sentencepiece(texts, 380, tmp_path)
    argv = user.flags(tmp_path / "out", "--model_name_or_path", tmp_path / "model", "--tokenizer_name", path)
    kind, message = run_ranks(1, refused, argv)[0]
    assert kind == "UserError" and "--tokenizer_name" in message and "qwen2" in message


# -- output folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_run(user: Playground, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "out"
    run(1, user.flags(out))
    return out


@pytest.mark.gloo
def test_another_run_is_not_touched(user: Playground, other_run: Path, tmp_path: Path) -> None:
    before = contents(other_run)
    mistaken = ["--overwrite_output_dir", "true"]
    checkpoint = other_run / "checkpoints" / "latest"
    cases = {
        "holds another run": user.flags(other_run),
        "no file matches": user.flags(other_run, *mistaken, "--train_files", tmp_path / "*.txt"),
        "q_prj": user.flags(other_run, *mistaken, "--target_modules", "q_prj"),
        "--warmup_steps": user.flags(other_run, *mistaken, "--max_steps", -1, "--warmup_steps", 5_000),
        "--mora_rank: 2": user.flags(tmp_path / "out", "--resume_from_checkpoint", checkpoint, "--mora_rank", 4),
        "is a file": user.flags(other_run / "run.yaml"),
    }
    assert_user_errors(list(cases.values()), [[part] for part in cases])
    assert contents(other_run) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.gloo
def test_a_folder_that_a_run_is_still_writing_to(user: Playground, other_run: Path, tmp_path: Path) -> None:
    """Its launcher was killed, and it is resumed or overwritten while the ranks live on."""
    out = Path(shutil.copytree(other_run, tmp_path / "out", symlinks=True))
    before = contents(out)
    holder = "import sys, pathlib as p; from mora_ds.train.output_folder import reserve; reserve(p.Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"{holder}; print('held', flush=True); input()", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True) as living:
        assert living.stdout is not None and living.stdout.readline() == "held\n"
        cases = [user.flags(out, "--resume_from_checkpoint", "auto"), user.flags(out, "--overwrite_output_dir")]
        assert_user_errors(cases, [[f"--output_dir {out}", "another run"]] * 2)
        living.kill()
    assert contents(out) == before
    assert run(1, user.flags(out, "--resume_from_checkpoint", "auto"))["steps"] == 6


@pytest.mark.gloo
def test_a_checkpoint_from_elsewhere_does_not_go_into_another_run(
    user: Playground, other_run: Path, tmp_path: Path
) -> None:
    run(1, user.flags(tmp_path / "out", "--save_steps", 3))
    before = contents(other_run)
    argv = user.flags(other_run, "--resume_from_checkpoint", tmp_path / "out" / "checkpoints" / "step-000003")
    kind, message = run_ranks(1, refused, argv)[0]
    assert kind == "UserError" and "holds another run" in message
    assert contents(other_run) == before


@pytest.mark.gloo
def test_overwriting_leaves_what_is_not_a_runs(user: Playground, other_run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(other_run, tmp_path / "out", symlinks=True))
    (out / "notes.txt").write_text("mine")
    run(1, user.flags(out, "--overwrite_output_dir", "true", "--max_steps", 3))
    assert (out / "notes.txt").read_text() == "mine"
    assert len(losses(out)) == 3
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == ["step-000003"]
    assert [path.name for path in out.glob(".*")] == [".lock"]


@pytest.mark.gloo
def test_a_run_killed_while_the_old_one_was_set_aside(user: Playground, other_run: Path, tmp_path: Path) -> None:
    """The old run comes back with the next attempt, and is refused, or overwritten, as a whole."""
    out = Path(shutil.copytree(other_run, tmp_path / "out", symlinks=True))
    before = contents(out)
    (out / ".overwritten").mkdir()
    for name in ("run.yaml", "metrics.jsonl", "checkpoints"):
        (out / name).rename(out / ".overwritten" / name)
    kind, message = run_ranks(1, refused, user.flags(out), True)[0]
    assert kind == "UserError" and "holds another run" in message
    assert contents(out) == before


# -- while running -------------------------------------------------------------------------------------------------


@pytest.mark.gloo
def test_a_loss_that_is_no_number_names_step_and_checkpoint(user: Playground, tmp_path: Path) -> None:
    """The learning rate makes the first steps diverge; a checkpoint from before is named."""
    out = tmp_path / "out"
    argv = user.flags(out, "--learning_rate", "1e25", "--warmup_steps", 0, "--save_steps", 1, "--eval_files", user.held)
    for kind, message in run_ranks(2, refused, argv):
        assert kind == "RunError" and "after step 1" in message and "none was written" in message
    assert not complete_checkpoints(out / "checkpoints"), "MoRA matrices with NaN are not saved"
    good = tmp_path / "good"
    run(1, user.flags(good, "--save_steps", 2, "--max_steps", 4))
    more = ["--learning_rate", "1e25", "--save_steps", 2, "--max_steps", 8]
    argv = user.flags(good, *more, "--resume_from_checkpoint", good / "checkpoints" / "step-000002")
    kind, message = run_ranks(1, refused, argv)[0]
    assert kind == "RunError" and "step 4" in message and str(good / "checkpoints" / "step-000002") in message
    assert all(verify_manifest(folder) == [] for folder in complete_checkpoints(good / "checkpoints"))


@pytest.mark.gloo
def test_a_model_with_an_infinite_weight(user: Playground, tmp_path: Path) -> None:
    shutil.copytree(user.model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    argv = user.flags(tmp_path / "out", "--model_name_or_path", tmp_path / "model")
    cases = [argv, [*argv, "--no_eval_on_start", "--overwrite_output_dir"]]
    (kind, message), (later, at_step) = run_ranks(1, refused_each, cases)[0]
    assert kind == later == "RunError"
    assert "before any training" in message
    assert "at step 1" in at_step and "none was written" in at_step


# -- the real launcher ---------------------------------------------------------------------------------------------


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("ranks", "more", "code", "part"),
    [
        pytest.param(1, ["--train_files", "/nowhere/*"], 2, "no file matches '/nowhere/*'", marks=pytest.mark.heavy),
        (2, ["--target_modules", "q_prj"], 2, "--target_modules 'q_prj'"),
        pytest.param(
            2, ["--learning_rate", "1e25"], 1, "Last good checkpoint: none was written", marks=pytest.mark.heavy
        ),
    ],
)
def test_the_launcher_says_it_once(
    user: Playground, tmp_path: Path, ranks: int, more: list[str], code: int, part: str
) -> None:
    done = launch(ranks, user.flags("out", *more), tmp_path, timeout_s=180)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.count(part) == 1 and done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out").exists() == (code == 1)


def test_the_export_tool(tmp_path: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "export_hf.py"), "--output", str(tmp_path / "merged")]
    more = {"env": environment(), "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([*tool, "--checkpoint", str(tmp_path)], check=False, **more)
    assert done.returncode == 2 and "--checkpoint" in done.stderr and "Traceback" not in done.stderr
