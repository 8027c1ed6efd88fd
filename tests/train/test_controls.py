"""The control that trains nothing at all."""

import pytest

from mora_ds.common.files import read_json
from tests.helpers.jobs import run


def test_none_reports_the_base(user, tmp_path):
    trained = run(1, user.flags(tmp_path / "trained", "--max_steps 2"))
    expected = pytest.approx(trained["perplexity_before"], rel=1e-6)
    for ranks in (1, 2):
        bare = tmp_path / f"bare-{ranks}"
        summary = run(ranks, user.flags(bare, "--adapter none"))
        assert summary["perplexity_before"] == summary["perplexity_after"] == expected
        assert summary["steps"] == summary["trainable_params"] == 0
        assert read_json(bare / "summary.json") == summary
        assert not (bare / "checkpoints").exists()
