"""tools/bench/pretrained.py: the texts that it makes out of installed packages."""

from tools.bench.pretrained import ontology_documents

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
