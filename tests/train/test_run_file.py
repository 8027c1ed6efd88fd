"""run.yaml: no secret of DeepSpeed's file is written into it."""

import yaml

from mora_ds.train.run_file import holds_run, owned_by_run, write_run_file
from tests.helpers.tables import parsed

DEEPSPEED = parsed("""
train_batch_size: 8
comet: {enabled: true, api_key: s3cret, project: mine}
wandb: {Password: s3cret, team: us}
tracker: {auth: [{access_token: s3cret, secrets: {a: s3cret, b: [s3cret, 7]}}]}
max_tokens: 100
""")


def test_secrets_are_masked_wherever_they_lie(tmp_path):
    write_run_file(
        tmp_path, {"seed": 1}, {"deepspeed": DEEPSPEED, "tokens": "5f32"}, ["ledger"]
    )
    text = (tmp_path / "run.yaml").read_text()
    assert "s3cret" not in text
    assert text.count("***") == 5
    resolved = yaml.safe_load(text)["resolved"]
    assert resolved["tokens"] == "5f32", "it names the training text"
    resolved = resolved["deepspeed"]
    assert resolved["max_tokens"] == 100
    assert resolved["comet"] == {"enabled": True, "api_key": "***", "project": "mine"}
    assert holds_run(tmp_path)
    assert owned_by_run(tmp_path) == ["ledger"]


def test_a_file_of_another_program_is_no_run(tmp_path):
    for text in (
        "seed: 1\n",
        "versions: 1\nresolved: 2\n",
        "versions: {}\nresolved: {}\n",
        "- a\n",
        "a: [\n",
        "",
    ):
        (tmp_path / "run.yaml").write_text(text)
        assert not holds_run(tmp_path)
        assert owned_by_run(tmp_path) == []
