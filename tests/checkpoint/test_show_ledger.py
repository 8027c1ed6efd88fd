"""A run's ledger is found, and shown as a table."""

from mora_ds.checkpoint.layout import find_ledger
from tests.helpers.errors import user_error
from tests.helpers.tools import call


def test_every_folder_of_a_run_leads_to_its_ledger(original, tmp_path):
    latest = original.output / "checkpoints/latest"
    of_run = find_ledger(original.output)
    assert of_run.ledger.folder == original.output / "ledger"
    assert of_run.checkpoint is None
    assert find_ledger(original.output / "ledger").checkpoint is None
    for path in (original.checkpoint, latest):
        assert find_ledger(path).checkpoint == original.checkpoint.resolve()
    with user_error("holds no ledger"):
        find_ledger(tmp_path)


def test_every_cycle_is_a_line(original, capsys):
    call("ledger", "show", original.output)
    lines = capsys.readouterr().out.splitlines()
    assert "3 cycle(s)" in lines[0]
    assert len(lines) == 5
    assert lines[3].split()[:3] == ["1", "2", "7"]
    assert "truncate/permuted" in lines[3]
