"""Every model family from end to end: load -> inject -> steps under ZeRO-3 -> merge ->
checkpoint -> export -> load.

Documents packed into one row do not see each other, in any family.
"""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.deploy.export import export_merged
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.models.load import load_base
from mora_ds.runtime.ranks import Ranks
from mora_ds.train.preflight import check_document_mask
from mora_ds.train.run import Run, RunOptions
from tests.helpers.engines import LEARNING_RATE, ds_config
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.models import (
    FAMILIES,
    NO_SDPA,
    alone,
    micro_step,
    tiny_model,
    tokens,
)
from tests.helpers.tables import parsed

WORLD = 2
ROWS = 2

ALSO_TRAINED = parsed("""
llama: {train_embeddings: true, train_norms: true, train_head: true}
qwen2: {train_embeddings: true, train_norms: true}  # tied
gpt2: {train_embeddings: true}  # tied, and positions too
gemma3_text: {train_norms: true}  # (1 + w) norms
""")
EXPERTS = ("mixtral", "qwen3_moe")
"""Families whose experts are adapted too."""
OPERATORS = ("share", "rotate", "decouple", "truncate")


def adapter(family):
    operator = OPERATORS[list(FAMILIES).index(family) % len(OPERATORS)]
    targets = ("all-linear", "experts") if family in EXPERTS else ("all-linear",)
    return MoRAConfig(
        rank=4,
        operator=operator,
        target_modules=targets,
        **ALSO_TRAINED.get(family, {}),
    )


def write_model(family, folder):
    """A model whose norms and biases differ from their initial ones and zeros."""
    model = tiny_model(family)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)


# -- end to end ------------------------------------------------------------------------


def end_to_end(root, family):
    """On one rank of several; the checkpoint lies in root/family/checkpoints afterwards."""
    folder = root / family
    loaded = load_base(
        folder / "model", folder / "base", Ranks.current(), torch.float32, None
    )
    config = adapter(family)
    inject(loaded.model, config)
    engine, *_ = initialize(model=loaded.model, config=ds_config(3, ROWS, 1))
    options = RunOptions(keys=loaded.keys)
    work = Run(engine, base=loaded.base, folder=folder, options=options)
    mora_matrices = {
        name: layer.mora_matrix for name, layer in mora_layers(loaded.model).items()
    }

    train_step(engine, seed=1)
    train_step(engine, seed=2)
    norms = {
        name: zero.full_fp32(mora_matrix).norm().item()
        for name, mora_matrix in mora_matrices.items()
    }
    before = probe(engine)
    work.merge(2)
    after = probe(engine)
    left = max(
        zero.full_fp32(mora_matrix).abs().max().item()
        for mora_matrix in mora_matrices.values()
    )

    # So that the checkpoint holds matrices that are not merged
    train_step(engine, seed=3)
    live = probe(engine)
    work.save(3)
    engine.destroy()
    return {
        "norms": norms,
        "before": before,
        "after": after,
        "left": left,
        "live": live,
        "own_base": loaded.base.folder != folder / "model",
    }


def train_step(engine, seed):
    own_rows = tokens(WORLD * ROWS, seed=seed)[dist.get_rank() * ROWS :][:ROWS]
    micro_step(engine, own_rows)


@torch.no_grad()
def probe(engine):
    return engine(input_ids=tokens(2, seed=77), use_cache=False).logits


def all_families(root):
    return {family: end_to_end(root, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of all families, and what each rank saw."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_model(family, root / family / "model")
    return root, run_ranks(WORLD, all_families, root)


def export(root, family):
    output = root / family / "merged"
    checkpoint = root / family / "checkpoints/latest"
    report = export_merged(checkpoint, output, verify=True, overwrite=True)
    return report, AutoModelForCausalLM.from_pretrained(output).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_change_every_matrix_and_a_merge_changes_no_logits(family, results):
    root, ranks = results
    for result in (rank[family] for rank in ranks):
        norms = result["norms"]
        assert min(norms.values()) > LEARNING_RATE, norms
        assert result["left"] == 0.0
        assert_close(result["after"], result["before"], rtol=0, atol=5e-6)
        assert torch.equal(result["live"], ranks[0][family]["live"])
    original = AutoModelForCausalLM.from_pretrained(root / family / "model").eval()
    with torch.no_grad():
        untrained = original(input_ids=tokens(2, seed=77)).logits
    assert (ranks[0][family]["before"] - untrained).abs().max() > 1e-3, (
        "the steps did nothing that can be measured"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_gives_the_logits_of_the_trained_model(family, results):
    root, ranks = results
    report, exported = export(root, family)
    with torch.no_grad():
        logits = exported(input_ids=tokens(2, seed=77)).logits
    live = ranks[0][family]["live"]
    assert (logits - live).abs().max() <= 1e-5 * max(1.0, live.abs().max().item())
    assert report.cycles == 1
    assert report.merged == len(ranks[0][family]["norms"])
    stored = load_file(root / family / "checkpoints/latest/adapter.safetensors")
    assert report.merged + report.replaced == len(stored)
    config = exported.config
    assert config.tie_word_embeddings == tiny_model(family).config.tie_word_embeddings
    tied = (
        exported.get_input_embeddings().weight
        is exported.get_output_embeddings().weight
    )
    assert tied == config.tie_word_embeddings


def test_no_family_needs_a_converted_base(results):
    """Files hold the model's weights one to one, or experts that are put into one tensor:
    nothing is written twice.
    """
    _, ranks = results
    assert not [family for family, result in ranks[0].items() if result["own_base"]]


def test_an_attention_that_the_model_lacks_is_named(tmp_path):
    write_model("gemma2", tmp_path)
    for wanted in ("sdpa", "spda", "flash_attention_2"):
        with user_error(f"--attn_implementation {wanted}"):
            load_base(tmp_path, tmp_path / "own", alone(), torch.float32, wanted)


# -- documents in one row --------------------------------------------------------------


def adapted(family, attention):
    """Weights large enough that attention is not uniform, so that a leak would be seen."""
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    for name, parameter in model.named_parameters():
        if "norm" not in name and ".ln_" not in name:
            parameter.data *= 5
    inject(model, MoRAConfig(rank=4))
    for layer in mora_layers(model).values():
        torch.nn.init.normal_(layer.mora_matrix, std=0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_no_family_see_each_other(family):
    """test_attention_run.py shows that the check finds a leak."""
    check_document_mask(adapted(family, "eager"))
    if family not in NO_SDPA:
        check_document_mask(adapted(family, "sdpa"))
