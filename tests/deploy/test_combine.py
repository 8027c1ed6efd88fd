"""Sums of updates against the same sums formed by hand in fp64, and what they refuse."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mora_ds.adapters import config
from mora_ds.adapters.config import MoRAConfig
from mora_ds.checkpoint.adapter_files import Adapter, BaseReference, write_adapter
from mora_ds.checkpoint.layout import step_name
from mora_ds.checkpoint.verify import verify
from mora_ds.common import files
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.combine import COMBINED, combine_adapters
from mora_ds.deploy.export import export_merged
from mora_ds.models.base import BaseCheckpoint
from mora_ds.models.rope import rope_changes
from tests.helpers.adapters import Maker
from tests.helpers.errors import run_error, user_error
from tests.helpers.exports import fake_run, layers_of
from tests.helpers.ledgers import mora_matrices_for, shortened
from tests.helpers.models import tiny_model
from tests.helpers.resume import assert_same_tensors
from tests.helpers.tables import each_row, parsed

TRAINED = ("model.embed_tokens.weight", "model.norm.weight")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two merges, embeddings and norm trained too; before its checkpoint lies
    one with a single merge.
    """
    fake = fake_run(
        tmp_path_factory.mktemp("run"),
        trained=TRAINED,
        num_hidden_layers=1,
        tie_word_embeddings=True,
    )
    earlier = fake.checkpoint.parent / step_name(3)
    shutil.copytree(fake.checkpoint, earlier)
    opened = Adapter.open(earlier)
    layers = layers_of(fake.live, 1)
    shortened(opened.ledger.folder, 1)
    trained = {name: opened.tensors.trained(name) + 0.5 for name in TRAINED}
    write_adapter(
        earlier,
        replace(opened.file, layers=layers, cycle=1, step=3),
        mora_matrices_for(layers, 77, scale=0.02),
        trained,
    )
    files.write_manifest(earlier)
    return fake


@pytest.fixture
def sum_folder(tmp_path):
    """The folder of the sum."""
    return tmp_path / "sum"


def content(folder):
    base = BaseCheckpoint.open(folder)
    return {key: base.read(key) for key in base.keys()}  # noqa: SIM118  (not a mapping)


def assert_same_model(one, another):
    """To the bit."""
    assert_same_tensors(content(one), content(another))


def by_hand(terms):
    """The expected sum of every tensor, computed in fp64 from complete deltas."""
    reference = BaseReference.read(terms[0][1])
    original = content((terms[0][1] / reference.folder).resolve())
    total = {key: tensor.double() for key, tensor in original.items()}
    for weight, folder in terms:
        opened = Adapter.open(folder)
        for module, entry in opened.file.layers.items():
            for spec, adapter_weight in [
                *opened.ledger.mora_matrices_of(module),
                (entry.operator, opened.tensors.mora_matrix(module)),
            ]:
                delta = weight * spec.delta_weight(adapter_weight.double())
                total[reference.keys[entry.weight]] += (
                    delta.T if entry.transposed else delta
                )
        for name in opened.file.trainables:
            key = reference.keys[name]
            total[key] += weight * (
                opened.tensors.trained(name).double() - original[key].double()
            )
    return total


def check(tensors, expected):
    for key, tensor in tensors.items():
        assert_close(tensor.double(), expected[key], rtol=2e-7, atol=2e-7, msg=key)


# -- scale -----------------------------------------------------------------------------


def test_scale_one_is_the_plain_export_to_the_bit(run, tmp_path, merged):
    lines = combine_adapters([run.checkpoint], [1.0], tmp_path / "same")
    assert lines[1] == "3 cycle(s), 2 of them in its ledger"
    export_merged(tmp_path / "same", merged)
    export_merged(run.checkpoint, tmp_path / "plain", delta_scale=1.0)
    assert_same_model(tmp_path / "plain", merged)
    assert verify(tmp_path / "same")[0].is_good
    assert (tmp_path / "same/tokenizer").is_dir() == (
        run.checkpoint / "tokenizer"
    ).is_dir()


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.2, -1.0])
def test_scale_multiplies_the_complete_update(run, merged, scale):
    report = export_merged(run.checkpoint, merged, delta_scale=scale)
    check(content(merged), by_hand([(scale, run.checkpoint)]))
    if scale == 0:
        assert_same_model(run.base, merged)
    card = (merged / "README.md").read_text()
    assert report.cycles == 2
    assert COMBINED in card
    assert f'"weight": {scale}' in card


def test_a_sum_is_rounded_once(run, tmp_path):
    combine_adapters([run.checkpoint], [0.3], tmp_path / "scaled")
    before = Adapter.open(run.checkpoint)
    after = Adapter.open(tmp_path / "scaled")
    for module in before.file.layers:
        exact = 0.3 * before.tensors.mora_matrix(module).double()
        assert torch.equal(after.tensors.mora_matrix(module), exact.float())


def test_rows_of_new_tokens_are_summed_with_those_of_the_base(tmp_path, base_folder):
    maker = Maker(tiny_model("llama", num_hidden_layers=1), base_folder)
    name = "model.embed_tokens.new_rows"
    config = MoRAConfig(rank=2, new_rows_from=120)
    maker.write(tmp_path / "adapter", config, trained={name: torch.ones(8, 32)})
    combine_adapters([tmp_path / "adapter"], [0.25], tmp_path / "scaled")
    rows = Adapter.open(tmp_path / "scaled").tensors.trained(name)
    original = maker.weights["model.embed_tokens.weight"][120:]
    assert_close(rows, 0.25 + 0.75 * original)


# -- sums of checkpoints ---------------------------------------------------------------


def test_a_sum_of_checkpoints_is_no_larger_than_one(run, tmp_path, merged):
    earlier = run.checkpoint.parent / step_name(3)
    combine_adapters([earlier, run.checkpoint], [0.45, 0.45], tmp_path / "mean")
    export_merged(tmp_path / "mean", merged)
    opened = Adapter.open(tmp_path / "mean")
    check(content(merged), by_hand([(0.45, earlier), (0.45, run.checkpoint)]))
    assert opened.ledger.cycles == opened.file.cycle == 2, (
        "checkpoints of a run share operators: no term is added"
    )
    assert [source["step"] for source in opened.file.facts[COMBINED]] == [3, 7]
    assert [record.step for record in opened.ledger.records] == [1, 3], (
        "the newest step of what each term sums"
    )


def test_a_sum_stands_alone(run, tmp_path, sum_folder):
    """The sum has the tokenizer of its last source, the base from `base_folder`, and
    hashes of all files."""
    source = Path(shutil.copytree(run.checkpoint, tmp_path / "source"))
    (source / "tokenizer").mkdir()
    (source / "tokenizer/tokenizer_config.json").write_text('{"from": "run"}')
    files.write_manifest(source)
    base = shutil.copytree(run.base, tmp_path / "moved")
    combine_adapters([run.checkpoint, source], [0.5, 0.5], sum_folder, base)
    assert (
        sum_folder / "tokenizer/tokenizer_config.json"
    ).read_text() == '{"from": "run"}'
    assert BaseReference.read(sum_folder).folder == str(base.resolve())
    # The copy does not find its base
    export_merged(source, tmp_path / "scaled", base, delta_scale=0.5)
    listed = files.listed_files(sum_folder)
    assert files.verify_manifest(sum_folder) == []
    assert {"adapter.json", "ledger/ledger.json"} <= set(listed)


# -- sums of runs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker(tmp_path_factory):
    return Maker(
        tiny_model("llama", num_hidden_layers=1),
        tmp_path_factory.mktemp("maker") / "base",
    )


SETTINGS = """
MoRAConfig | {rank: 3, seed: 0} | {rank: 4, seed: 1} | 2
MoRAConfig | {rank: 3, seed: 0} | {rank: 3, seed: 1, operator: share} | 2
MoRAConfig | {rank: 3, seed: 0} | {rank: 3, seed: 0} | 1
LoRAConfig | {rank: 2, seed: 5} | {rank: 2, seed: 6} | 2
"""
"""A kind of adapter | settings of one run | of the other | terms of their sum."""


@each_row("kind, first, second, terms", SETTINGS)
def test_sum_of_two_runs(maker, tmp_path, sum_folder, kind, first, second, terms):
    adapter = getattr(config, kind)
    maker.write(tmp_path / "a", adapter(**parsed(first)))
    maker.write(tmp_path / "b", adapter(**parsed(second)))
    combine_adapters([tmp_path / "a", tmp_path / "b"], [0.75, -0.5], sum_folder)
    assert Adapter.open(sum_folder).file.cycle == int(terms) - 1
    export_merged(sum_folder, tmp_path / "merged")
    check(
        content(tmp_path / "merged"),
        by_hand([(0.75, tmp_path / "a"), (-0.5, tmp_path / "b")]),
    )
    ids = torch.arange(8).unsqueeze(0)
    live = load_adapter(maker.folder, sum_folder)(input_ids=ids).logits
    merged = (
        type(maker.model)
        .from_pretrained(tmp_path / "merged")
        .eval()(input_ids=ids)
        .logits
    )
    assert_close(live, merged, rtol=0, atol=1e-5)


def test_domains_are_summed_too(maker, tmp_path, sum_folder):
    for seed, name in enumerate("ab"):
        maker.write(
            tmp_path / name,
            MoRAConfig(rank=3, seed=0),
            scale=0.02 + seed,
            domains=("law", "code"),
        )
    combine_adapters([tmp_path / "a", tmp_path / "b"], [0.5, 2.0], sum_folder)
    adapters = [Adapter.open(tmp_path / name) for name in ("a", "b", "sum")]
    for module in adapters[-1].file.layers:
        a, b, total = (
            adapter.tensors.domain_mora_matrix(module, "code") for adapter in adapters
        )
        assert_close(total, 0.5 * a + 2 * b)


# -- errors ----------------------------------------------------------------------------


def test_bases_layers_and_trained_tensors_must_be_the_same(
    maker, tmp_path, sum_folder, base_folder
):
    """Other errors are lines of tests/config/test_bad_tool_calls.py."""
    maker.write(tmp_path / "a", MoRAConfig(rank=3))
    maker.write(tmp_path / "fewer", MoRAConfig(rank=3, target_modules=("q_proj",)))
    norm = {"model.norm.weight": torch.ones(maker.weights["model.norm.weight"].shape)}
    maker.write(tmp_path / "norms", MoRAConfig(rank=3), trained=norm)
    maker.write(tmp_path / "law", MoRAConfig(rank=3), domains=("law", "code"))
    longer = rope_changes(maker.model.config, {"rope_type": "linear", "factor": 2.0})
    maker.write(tmp_path / "long", MoRAConfig(rank=3), config_changes=longer)
    another_base = Maker(tiny_model("llama", num_hidden_layers=1, seed=9), base_folder)
    another_base.write(tmp_path / "other", MoRAConfig(rank=3))
    for name, message in (
        ("fewer", "adapt different layers"),
        ("norms", "train different tensors"),
        ("law", "have different domains"),
        ("long", "have bases with different rotary embeddings"),
        ("other", "have different bases"),
    ):
        with user_error(message):
            combine_adapters([tmp_path / "a", tmp_path / name], [1, 1], sum_folder)
    assert not sum_folder.exists()


def test_a_sum_that_is_not_finite_is_not_written(maker, tmp_path, sum_folder):
    maker.write(tmp_path / "a", MoRAConfig(rank=3))
    with run_error("is not finite"):
        combine_adapters([tmp_path / "a"], [1e300], sum_folder)
    assert not sum_folder.exists()
