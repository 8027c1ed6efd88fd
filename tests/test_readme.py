"""What the README shows must run: the plugin's lines, word for word, in a loop over two
ranks.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from mora_ds.models.base import write_own_base
from tests.helpers.engines import ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.models import tiny_model, tokens
from tests.helpers.pages import code_with


def plugin_code():
    return code_with("mora_ds.inject")


class Rows(torch.utils.data.Dataset):
    """Token rows as Hugging Face models take them."""

    def __init__(self):
        self.rows = tokens(24)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def run_plugin_code(folder):
    os.chdir(folder)
    model_folder = Path("model")
    if dist.get_rank() == 0:
        write_own_base(tiny_model("llama"), model_folder)
    dist.barrier()
    names = {
        "model": AutoModelForCausalLM.from_pretrained(model_folder),
        "model_folder": model_folder,
        "data": Rows(),
        "ds_config": ds_config(3, 2, 1),
    }
    exec(plugin_code(), names)
    return names["run"].remora.cycle


@pytest.fixture(scope="module")
def plugin_run(tmp_path_factory):
    """The folder in which the lines have run."""
    folder = tmp_path_factory.mktemp("plugin")
    assert run_ranks(2, run_plugin_code, str(folder)) == [1, 1]
    return folder


def test_the_plugin_lines_run_as_they_stand(plugin_run):
    assert len(plugin_code().splitlines()) <= 16
    assert (plugin_run / "merged/model.safetensors").is_file()


def resumed_run(folder):
    """A second process: refused without `resume`, back at its place with it."""
    import mora_ds

    os.chdir(folder)
    model = AutoModelForCausalLM.from_pretrained("model")
    config = mora_ds.MoRAConfig(rank=8)
    mora_ds.inject(model, config)
    engine, *_ = mora_ds.initialize(model=model, config=ds_config(3, 2, 1))
    try:
        mora_ds.Run(engine, base="model", folder="out")
    except mora_ds.UserError as error:
        assert "another run" in str(error)
    else:
        raise AssertionError("a folder that holds a run was taken")
    run = mora_ds.Run(engine, base="model", folder="out", resume="auto")
    base = AutoModelForCausalLM.from_pretrained("model").state_dict()
    moved = any(
        not torch.equal(layer.weight, base[f"{name}.weight"])
        for name, layer in mora_ds.mora_layers(model).items()
    )
    return run.state.step, moved


def test_the_snippet_resumes(plugin_run):
    assert run_ranks(2, resumed_run, str(plugin_run)) == [(6, True), (6, True)]
