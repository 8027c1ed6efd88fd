"""Ways to damage a file: cut short, one bit flipped, deleted, another JSON; and a
checkpoint small enough for it.
"""

import json
import os
import shutil
import subprocess

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mora_ds.checkpoint.manager import CheckpointManager
from mora_ds.checkpoint.storage import LocalStorage
from mora_ds.common.files import write_manifest


def cut(path):
    # One would be the line break that ends our JSON
    os.truncate(path, path.stat().st_size - 2)


def flip(path, where=0.5):
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * where))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def gone(path):
    path.unlink()


def make_own(path):
    """Make it a file of its own, for cycles of the ledger have several names."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def another_base(model, folder):
    """A copy of a model folder in which one number of a norm is another one."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


HARMS = {"cut": cut, "flip": flip, "gone": gone}


def mount(folder, *options):
    """Skips the test where mounting is not allowed."""
    done = subprocess.run(
        ["mount", *options, str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting needs root")


def change_json(path, change):
    """Applies `change` to the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_value(content, change):
    """Change JSON in place, as `cycles.0.file = ../x` says: keys and positions, and a value
    as YAML; without one, the entry goes."""
    path, _, text = change.partition(" = ")
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    for key in parents:
        content = content[key]
    if text:
        content[last] = yaml.safe_load(text)
    else:
        del content[last]


def checkpoint_at(root, step):
    """A checkpoint of one file and its manifest."""
    folder = root / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "file").write_text(str(step))
    write_manifest(folder)
    return folder


def manager_of(root):
    """For checkpoints in a folder, without a run."""
    return CheckpointManager(LocalStorage(root), (), None)
