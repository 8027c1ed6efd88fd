"""Settings that earlier versions had are refused by name, with what to do instead."""

from dataclasses import fields

import pytest

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.config.flags import REMOVED


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_is_refused_with_what_takes_its_place(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: 1\n")
    flags = [f"--{name}", f"--{name}=1"]
    if name == "local_rank":
        flags.pop()  # as launchers add it
    for argv in ([str(recipe)], [f"--{name}", "1"], *([flag] for flag in flags)):
        with pytest.raises(UserError) as refusal:
            parse(argv)
        assert f"{name} {REMOVED[name]}" in str(refusal.value)


def test_no_removed_setting_is_still_there():
    arguments = parse([])
    groups = (getattr(arguments, group.name) for group in fields(arguments))
    present = {
        field.name
        for group in groups
        if hasattr(group, "__dataclass_fields__")
        for field in fields(group)
    }
    assert not present & REMOVED.keys()
