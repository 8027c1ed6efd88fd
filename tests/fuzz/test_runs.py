"""Random settings: they run, or are refused by name with nothing left behind; nothing
else.

Each commit tries others. FUZZ="SEED COUNT" in the environment has the heavy test try these
instead.
"""

import os
from collections import Counter
from dataclasses import fields

import pytest

from mora_ds.config.arguments import dump, parse
from mora_ds.config.research import ResearchSettings
from tests.helpers.fuzz import seed_of_commit
from tests.helpers.fuzz_runs import SETTINGS, SMALL, fuzz, prepare
from tests.helpers.tables import rows

CASES = 50
"""Seeds for each commit: about 140 runs."""

OF_EVERY_CASE = {*SMALL, "model_name_or_path", "train_files", "mixture"}
ELSEWHERE = {
    "push_to_hub",
    "model_config",
    "dataset_name",
    "research.targets",
}
"""Settings that need a network, another kind of model or text, or a plan."""


def test_every_setting_is_tried():
    known = dump(parse([])).keys()
    known |= {f"research.{field.name}" for field in fields(ResearchSettings)}
    tried = {name for name, *_ in rows(SETTINGS)}
    assert {*tried, *OF_EVERY_CASE, *ELSEWHERE} == known


@pytest.mark.heavy(seconds=110)
@pytest.mark.timeout(1200)
def test_settings_run_or_are_refused_by_name(user, tmp_path):
    first, count = map(
        int, os.environ.get("FUZZ", f"{seed_of_commit()} {CASES}").split()
    )
    prepare(user)
    findings = fuzz(user, range(first, first + count), tmp_path)
    print(f"seeds from {first} on:", Counter(kind for _, kind, _, _ in findings))
    faults = [
        f'FUZZ="{seed} 1": {settings}\n{said}'
        for seed, kind, said, settings in findings
        if kind == "fault"
    ]
    assert not faults, "\n\n".join(faults)
    assert len(findings) >= 2 * count, "too few of the cases came to an end"
