"""A MoRA matrix for each domain: sums over rows, merges, errors, sharded ranks, complete
runs.
"""

import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.domains import (
    domain_layers,
    domains_of,
    mora_matrices_of_rows,
    update_rows,
)
from mora_ds.adapters.inject import inject, set_cycle
from mora_ds.adapters.ops.mora import OperatorSpec, adjoint, delta_weight
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.common.files import read_json
from mora_ds.config.arguments import from_flat, parse
from mora_ds.config.validate import validate
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.eval.perplexity import load_target
from mora_ds.models.loss import chunk_loss
from mora_ds.train.evaluator import Evaluator
from mora_ds.train.preflight import check_domains
from mora_ds.train.run_file import RUN_FILE
from tests.helpers.errors import run_error, user_error
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import (
    REPOSITORY,
    research,
    run,
    validation_errors_of,
)
from tests.helpers.mixtures import mixture_flags, write_mixture
from tests.helpers.models import tiny_model, tokens
from tests.helpers.operators import random
from tests.helpers.outcome import assert_good
from tests.helpers.resume import assert_close_runs, interrupted_job
from tests.helpers.tables import parsed, rows

NAMES = ("law", "code", "news", "prose")


def domain_model(operator, family="llama", cycle=0, **config):
    """A model whose matrices are not zero, so that every path carries a gradient."""
    model = tiny_model(family)
    wanted = MoRAConfig(rank=4, operator=operator, domains=NAMES, **config)
    inject(model, wanted)
    set_cycle(model, wanted, cycle)
    generator = torch.Generator().manual_seed(0)
    for layer in domain_layers(model).values():
        for value in (layer.mora_matrix, layer.domain_mora_matrices):
            value.data = 0.02 * torch.randn(value.shape, generator=generator)
    return model


ROWS = ("code", "law", "prose", "code", "news", "law", "law", "prose")


def row_losses(model, ids):
    """(rows,) summed next-token losses."""
    logits = model(input_ids=ids, use_cache=False).logits
    nll = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return nll.view(len(ids), -1).sum(dim=1)


MIXED = """
truncate | gpt2 | 0
share | llama | 0
decouple | llama | 0
rotate | gpt2 | 0
share | gpt2 | 3
rotate | llama | 3
"""
"""An operator | a family | merges before."""


@pytest.mark.parametrize("operator, family, cycles", rows(MIXED))
def test_a_mixed_batch_is_what_one_model_a_domain_makes_of_its_rows(
    operator, family, cycles
):
    """Losses of every row and gradients of every matrix, against plain models with the
    deltas of M and of one M_k in their weights; also after merges, when the two have
    different operators."""
    cycle = int(cycles)
    model = domain_model(operator, family, cycle)
    ids = tokens(len(ROWS), 12)
    layers = domain_layers(model)
    assert all(
        (layer.spec == layer.own_spec) == (cycle == 0) for layer in layers.values()
    )
    domains_of(model).set(ROWS)
    mixed = row_losses(model, ids)
    mixed.sum().backward()
    shared = {
        name: torch.zeros_like(layer.mora_matrix) for name, layer in layers.items()
    }
    for index, domain in enumerate(NAMES):
        chosen = torch.tensor([name == domain for name in ROWS])
        plain = tiny_model(family)
        weights = {name: plain.get_parameter(f"{name}.weight") for name in layers}
        for name, layer in layers.items():
            delta = delta_weight(layer.spec, layer.mora_matrix.data)
            delta += delta_weight(
                layer.own_spec, layer.domain_mora_matrices.data[index]
            )
            weights[name].data += delta.T if layer.transposed else delta
        alone = row_losses(plain, ids[chosen])
        alone.sum().backward()
        torch.testing.assert_close(mixed[chosen], alone, rtol=1e-5, atol=0)
        for name, layer in layers.items():
            gradient = weights[name].grad.T if layer.transposed else weights[name].grad
            of_domain = layer.domain_mora_matrices.grad[index]
            assert_close(of_domain, adjoint(layer.own_spec, gradient))
            shared[name] += adjoint(layer.spec, gradient)
    for name, layer in layers.items():
        assert_close(layer.mora_matrix.grad, shared[name])
        assert shared[name].abs().max() > 1e-3


def assert_close(gradient, expected):
    """Equal within a few millionths of the largest element."""
    assert (gradient - expected).abs().max() <= 5e-6 * max(
        1.0, expected.abs().max().item()
    )


@pytest.mark.parametrize("kind", OperatorKind)
def test_gradients_of_rows(kind):
    """Against finite differences, also if r_hat is larger than a side or divides none;
    one row has no domain."""
    third = [0.0, 0.0, 1.0]
    choice = torch.tensor([third, [0.0] * 3, third], dtype=torch.float64)
    for d_in, d_out, r_hat in ((10, 7, 4), (3, 9, 6), (9, 3, 4), (5, 5, 8)):
        spec = OperatorSpec(kind, d_in, d_out, r_hat, Grouping.PERMUTED, seed=3)

        def update(mora_matrices, x, spec=spec):
            return update_rows(spec, mora_matrices_of_rows(mora_matrices, choice), x)

        mora_matrices = random(3, r_hat, r_hat).requires_grad_()
        x = random(3, 2, d_in, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(update, (mora_matrices, x))


def test_a_row_without_a_mora_matrix_is_refused_by_name():
    model = domain_model("share")
    ids = tokens(2, 8)
    domains = domains_of(model)
    with user_error(r"unknown domain 'lwa'; known: law, code, news, prose.*'law'"):
        domains.set(["code", "lwa"])
    with run_error("training needs the domain of each row"):
        row_losses(model.train(), ids)
    domains.set(["law", "law", "code"])
    with run_error("domains are set for 3 rows, but a layer reads"):
        row_losses(model, ids)
    domains.set(["law", "code"])
    before = row_losses(model, ids)
    with domains.using("prose"):
        assert not torch.equal(row_losses(model, ids), before)
    assert torch.equal(row_losses(model, ids), before), "as it was set before"


class Wrapped:
    """The parts of an engine that the check uses."""

    device = "cpu"

    def __init__(self, module):
        self.module = module
        self.eval = module.eval
        self.train = module.train

    def __call__(self, **batch):
        return self.module(**batch)


def test_a_layer_that_does_not_see_complete_rows_is_refused():
    good = domain_model("rotate")
    check_domains(Wrapped(good))
    with domains_of(good).of_rows(["law", "code"]):
        assert domains_of(good).choice(torch.zeros(2, 8, 32)) is not None
    assert domains_of(good).choice(torch.zeros(2, 8, 32)) is None, (
        "no other forward pass inherits them"
    )
    model = domain_model("rotate", target_modules=("q_proj", "lm_head"))
    chunk_loss(model)
    with user_error(
        r"domains are set for 3 rows, but a layer reads .*--target_modules"
    ):
        check_domains(Wrapped(model))


# -- complete runs ---------------------------------------------------------------------


def domain_flags(user, out, mix, *more, **settings):
    """Flags after a recipe with domains; each set of `settings` has a recipe of its own."""
    flags = mixture_flags(user, out, mix, *more)
    folder = mix.parent / f"recipe-{len(list(mix.parent.glob('recipe-*')))}"
    folder.mkdir()
    return research(flags, folder, domain_adapters=True, **settings)


MERGES = "--merge_every 3 --restart_warmup_steps 1"
MERGING = f"{MERGES} --save_steps 2 --learning_rate 5e-2"


def test_a_run_merges_resumes_on_other_ranks_and_is_exported(user, tmp_path, out):
    """Two ranks and a merge; begun on one rank, stopped in step 5 and resumed on two; every
    domain's model is live.
    """
    mix = write_mixture(user, tmp_path / "mix.yaml")
    reference = tmp_path / "reference"
    flags = (MERGING, "--eval_files", f"old={user.held}", f"plain={user.held}")
    summary = run(2, domain_flags(user, reference, mix, *flags))
    assert summary["merges"] == 1
    block = yaml.safe_load((reference / RUN_FILE).read_text())["research"]
    assert block == {"domain_adapters": True}, "run.yaml repeats the block"
    after = summary["perplexity_after"]
    assert after["old"] != after["plain"], "one text, read with a domain and with none"
    resume = (*flags, "--resume_from_checkpoint auto")
    argv = domain_flags(user, out, mix, *resume)
    run_alone(interrupted_job, [*argv, "--per_device_train_batch_size", "4"], 5)
    run(2, argv)
    assert_close_runs(out, reference)
    assert_good(reference)

    latest = reference / "checkpoints/latest"
    facts = read_json(latest / "adapter.json")
    assert facts["domains"]["names"] == ["new", "old"]
    assert facts["cycle"] == 1
    probe = load_file(latest / "probe.safetensors")
    live = {}
    for domain in ("shared", "new", "old"):
        report = export_merged(latest, tmp_path / domain, verify=True, domain=domain)
        assert report.merged == 14
        recorded = probe["logits" if domain == "shared" else f"logits.{domain}"]
        with torch.no_grad():
            model = load_adapter(user.model, latest, domain=domain)
            live[domain] = model(input_ids=probe["input_ids"], use_cache=False).logits
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / domain)
            exported = plain(input_ids=probe["input_ids"], use_cache=False).logits
        torch.testing.assert_close(live[domain], recorded, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exported, recorded, rtol=1e-5, atol=1e-5)
    for another in ("old", "shared"):
        assert (live["new"] - live[another]).abs().max() > 1e-3
    assert "| domain | old |" in (tmp_path / "old/README.md").read_text()
    assert_choices_are_named(user, reference, tmp_path)

    mix.write_text(mix.read_text().replace("  old:", "  older:"))
    message = validation_errors_of(domain_flags(user, out, mix, *resume), ranks=2)
    assert "research.domain_adapters" in message
    assert "['new', 'old'] there, ['new', 'older'] here" in message


def assert_choices_are_named(user, out, tmp_path):
    known = "name a domain of this adapter, which has new, old, shared"
    for domain in (None, "nwe"):
        with user_error(f"`domain` {domain}: {known}"):
            export_merged(out, tmp_path / "never", domain=domain)
    with user_error(f"`domain` third: {known}"):
        load_adapter(user.model, out, domain="third")
    with user_error(r"--domain None: name a domain"):
        load_target(out)
    model = load_target(out, domain="old").model
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.domains is domains_of(model)
    assert not (tmp_path / "never").exists()


WRONG = """
{train_files: [x.txt]} | needs a named source per domain
{adapter: lora} | research.domain_adapters: --adapter lora does not support domains
{adapter: full} | research.domain_adapters: --adapter full does not support domains
{compute: weight} | --compute weight uses one weight for all sequences
{tensor_parallel_size: 2} | leave --tensor_parallel_size at 1
{train_files: ["shared=x:1", "b=y:1"]} | 'shared' stands for the shared MoRA matrix
{train_files: ["..=x:1", "b=y:1"]} | '..' cannot be a domain's name
"""


@pytest.mark.parametrize("changes, message", rows(WRONG))
def test_incompatible_settings_are_named(changes, message):
    settings = {
        "model_name_or_path": "m",
        "train_files": ["a=x:1", "b=y:1"],
        "research": {"domain_adapters": True},
        **parsed(changes),
    }
    with user_error(re.escape(message)):
        validate(from_flat(settings))


BLOCKS = """
{domain_adaptors: true} | unknown key 'research.domain_adaptors'. Did you mean 'domain_adapters'?
{domain_adapters: 1} | research.domain_adapters must be true or false, got 1
{targets: 3} | research.targets must be a text, got 3
[targets] | research must be `key: value` lines
"""


@pytest.mark.parametrize("block, message", rows(BLOCKS))
def test_a_block_is_read_as_strictly_as_flags(tmp_path, block, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"research: {block}\n")
    with user_error(f"{path}.*{re.escape(message)}"):
        parse([str(path)])


def test_a_set_is_read_as_the_domain_with_its_name_or_that_it_was_held_out_of():
    loaded = SimpleNamespace(model=domain_model("rotate"))
    data = SimpleNamespace(evaluation={})
    start = SimpleNamespace(arguments=parse([]), data=data, loaded=loaded, state=None)
    evaluator = Evaluator(start, None, None)
    expected = {
        "law": "law",
        "held_out_code": "code",
        "held_out": None,
        "general": None,
    }
    assert {name: evaluator.domain_of(name) for name in expected} == expected


WAYS = """
2 | --optimizer muon --train_norms --train_embeddings --train_head
1 | --base_bits 8 --bf16 --chunked_loss
2 | --streaming --gradient_checkpointing
"""
"""Ranks | other options."""


@pytest.mark.heavy
@pytest.mark.parametrize("world, more", rows(WAYS))
def test_domains_with_other_options(user, tmp_path, out, world, more):
    """A merge, and exports that give the live model's logits (within the tolerances of
    `logits_check`).
    """
    mix = write_mixture(user, tmp_path / "mix.yaml")
    argv = domain_flags(user, out, mix, MERGES, "--export_merged", more)
    assert run(int(world), argv)["merges"] == 1
    assert_good(out)
    assert {path.name for path in (out / "merged").iterdir()} == {
        "shared",
        "new",
        "old",
    }
    for domain in ("shared", "old"):
        export_merged(out, tmp_path / domain, verify=True, domain=domain)


SHARDED = """
configs/zero1.json | 2 | 1 | 1
configs/zero2.json | 1 | 2 | 1
configs/zero3.json | 4 | 1 | 2
"""
"""DeepSpeed's file | rows of a rank | micro-batches | ranks that share a row."""


@pytest.mark.heavy
def test_two_ranks_follow_one(user, tmp_path):
    """However they share the work, with gradient checkpointing."""
    mix = write_mixture(user, tmp_path / "mix.yaml")
    reference = tmp_path / "reference"

    def flags(out, row_count, *more):
        batch = f"--per_device_train_batch_size {row_count} --gradient_checkpointing"
        return domain_flags(user, out, mix, MERGING, batch, *more)

    run(1, flags(reference, 4))
    for number, (config, row_count, micro_batches, shared) in enumerate(rows(SHARDED)):
        out = tmp_path / str(number)
        split = f"--gradient_accumulation_steps {micro_batches} --sequence_parallel_size {shared}"
        run(2, flags(out, row_count, split, "--deepspeed", REPOSITORY / config))
        assert_close_runs(out, reference)
