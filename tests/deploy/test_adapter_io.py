"""load_adapter: which domain a model computes as, and what does not fit a model."""

from dataclasses import replace

import pytest
import torch

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.domains import domains_of
from mora_ds.common.files import read_json
from mora_ds.deploy.adapter_io import export_adapter, load_adapter
from tests.helpers.adapters import Maker, merge, originals
from tests.helpers.crafted import reseal
from tests.helpers.damage import change_json, set_value
from tests.helpers.errors import user_error
from tests.helpers.models import tiny_model, tokens
from tests.helpers.tables import each_row


@pytest.fixture
def maker(base_folder):
    return Maker(tiny_model("llama", num_hidden_layers=1), base_folder)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=tokens(2), use_cache=False).logits


def test_a_model_of_several_domains_computes_as_the_one_that_is_named(maker, tmp_path):
    """Each domain has the shared matrices once more: none of them adds them once, a domain
    twice.
    """
    updates = maker.write(
        tmp_path / "adapter",
        MoRAConfig(rank=3, domains=("law", "code")),
        1,
        domains=("law", "code"),
    )
    for domain, times in ((None, 1), ("shared", 1), ("code", 2)):
        model = load_adapter(maker.folder, tmp_path / "adapter", domain=domain)
        expected = tiny_model("llama", num_hidden_layers=1)
        domain_updates = {
            name: [*cycles, *cycles[-1:] * (times - 1)]
            for name, cycles in updates.items()
        }
        merge(expected, originals(maker.model), domain_updates)
        torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)
        assert domains_of(model).names == ("law", "code")


@pytest.fixture
def adapter(maker, tmp_path):
    """Matrices of two kinds of layers, and trained norms."""
    config = MoRAConfig(rank=3, target_modules=("q_proj", "up_proj"), train_norms=True)
    norms = {name: weight for name, weight in maker.weights.items() if "norm" in name}
    maker.write(tmp_path / "adapter", config, trained=norms)
    load_adapter(maker.folder, tmp_path / "adapter")
    return tmp_path / "adapter"


UNFIT = r"""
adapter.json | config.rank = 5 | the shape of .*up_proj.mora_matrix is
adapter.json | config.target_modules = [q_proj] | the shape of .*up_proj.mora_matrix is .* there, None here
adapter.json | config.train_norms = false | the shape of .*0.input_layernorm.weight is \(32,\) there, None here
base.json | keys = {} | names no tensor of
"""


@each_row("file, change, words", UNFIT)
def test_an_adapter_that_does_not_fit_its_model_is_refused(
    maker, adapter, file, change, words
):
    change_json(adapter / file, lambda content: set_value(content, change))
    reseal(adapter)
    with user_error(words):
        load_adapter(maker.folder, adapter)


def test_an_operator_of_other_sides_is_refused(maker, adapter):
    """Half of the inputs, at the same side of M."""

    def change(content):
        name = next(name for name in content["layers"] if name.endswith("q_proj"))
        content["layers"][name]["operator"]["d_in"] //= 2

    change_json(adapter / "adapter.json", change)
    reseal(adapter)
    with user_error("its operator of .*q_proj is of another shape"):
        load_adapter(maker.folder, adapter)


def test_a_base_that_moves_with_its_run_is_found_from_an_exported_adapter(
    maker, tmp_path, base_folder
):
    """A relative folder in base.json is relative to where it lies: a copy elsewhere names
    the same base.
    """
    maker.write(tmp_path / "runs/adapter", MoRAConfig(rank=3))
    replace(maker.reference, folder="../../base").write(tmp_path / "runs/adapter")
    reseal(tmp_path / "runs")
    export_adapter(tmp_path / "runs/adapter", tmp_path / "far/away/adapter")
    content = read_json(tmp_path / "far/away/adapter/base.json")
    assert content["folder"] == str(base_folder.resolve())
