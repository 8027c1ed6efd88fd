"""Small tasks of the lm-eval harness, from files."""

import json
import random

import yaml

from tests.helpers.tables import parsed

WORDS = "value name result index return string number list"
KINDS = parsed(r"""
choices:
  output_type: multiple_choice
  doc_to_text: "{{question}}"
  doc_to_choice: choices
  doc_to_target: answer
  metric_list: [{metric: acc}]
continued:
  output_type: generate_until
  doc_to_text: "{{question}}"
  doc_to_target: x
  generation_kwargs: {until: ["\n"], max_gen_toks: 6, do_sample: false}
  metric_list: [{metric: exact_match}]
rolling:
  output_type: loglikelihood_rolling
  doc_to_text: ""
  doc_to_target: "{{question}}"
  metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""")


def task_files(folder):
    """Three tasks of seven documents, one of each kind of request: choices, continuation,
    perplexity.
    """
    draw = random.Random(0)
    words = WORDS.split()
    rows = [
        {
            "question": " ".join(draw.choices(words, k=1 + row)),
            "choices": words[row % 4 :][:4],
            "answer": row % 4,
        }
        for row in range(7)
    ]
    data = folder / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {}
    read = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
    }
    for name, kind in KINDS.items():
        task = {"task": name, **read, "test_split": "test", **kind}
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(task))
    return files
