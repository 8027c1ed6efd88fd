"""The site builds without a warning: every link, every anchor and every name of the API is
there.
"""

import os
import sys

import pytest

from tests.helpers.pages import ROOT
from tests.helpers.tools import called

pytestmark = pytest.mark.heavy


def test_the_site_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-d",
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = called(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "load_adapter" in (tmp_path / "site/reference/api/index.html").read_text()
    changelog = (tmp_path / "site/changelog/index.html").read_text()
    assert "0.1.0" in changelog
