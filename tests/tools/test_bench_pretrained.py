"""tools/bench/pretrained.py: the texts that it makes out of installed packages."""

import json

from mora_ds.train.tasks import check_tasks
from tools.bench.pretrained import ontology_documents, questions_of, write_task

OBO = r"""format-version: 1.2

[Term]
id: HP:1
name: Small hand
def: "A hand that is \"small\"." [PMID:1]
comment: Seen in infants.\nOften mild.
synonym: "Hypoplastic hand" EXACT []
synonym: "Short hand" RELATED layperson []
is_a: HP:7 ! Abnormal hand

[Term]
id: HP:2
name: Has no definition

[Typedef]
id: part_of
def: "Not a term." []
"""


def test_document_has_definition_comment_synonyms_and_parents() -> None:
    text = (
        'Small hand\nA hand that is "small".\nSeen in infants.\nOften mild.\n'
        "Also called: Hypoplastic hand; Short hand.\nA kind of: Abnormal hand.\n"
    )
    assert list(ontology_documents(OBO)) == [("HP:1", text)]


DOCUMENTS = [f"Name {number}\nMeaning {number}.\n" for number in range(8)]


def test_questions_have_one_right_definition() -> None:
    questions = questions_of(DOCUMENTS)
    assert len(questions) == len(DOCUMENTS)
    for question in questions:
        name = question["question"].split('"')[1]
        choices = question["choices"]
        assert choices[question["answer"]] == name.replace("Name", "Meaning") + "."
        assert len(set(choices)) == 4
    assert len({question["answer"] for question in questions}) > 1


def test_lm_eval_loads_the_task(tmp_path) -> None:
    documents = tmp_path / "terms.jsonl"
    documents.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    )
    write_task(tmp_path, "terms", documents)
    check_tasks([str(tmp_path / "terms.yaml")])
