"""tools/fetch_demo_model.py, but for what it downloads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from mora_ds.train.tasks import check_tasks, task_names
from tests.helpers.tools import tool


def test_the_task_is_one_that_the_harness_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = tool("fetch_demo_model")
    question = {
        "question": "What is wet?",
        "choices": {"text": ["fire", "water"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    Dataset.from_list([question] * 3).save_to_disk(tmp_path / "given")
    monkeypatch.setattr(fetch, "_member", lambda *given: next((tmp_path / "given").glob("*.arrow")))
    fetch.write_task(tmp_path, tmp_path)
    lines = (tmp_path / f"{fetch.TASK}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [question] * 3
    file = str(tmp_path / f"{fetch.TASK}.yaml")
    check_tasks([file])
    assert task_names([file]) == [fetch.TASK]

    from lm_eval.tasks import TaskManager, get_task_dict

    task = get_task_dict([fetch.TASK], TaskManager(include_path=str(tmp_path)))[fetch.TASK]
    (first, *_) = task.validation_docs()
    assert task.doc_to_text(first) == "Question: What is wet?\nAnswer:"
    assert task.doc_to_choice(first) == ["fire", "water"] and task.doc_to_target(first) == 1
