"""A MoRA matrix for each domain, added to the shared one: sums over rows, merges, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.domain_names import Freeze
from mora_ds.adapters.domains import Domains, domain_layers, domains_of, squares_of_rows, update_rows
from mora_ds.adapters.inject import inject, layer_for, mora_layers
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec, delta_weight, mora_update
from mora_ds.adapters.ops.spec import Grouping, OperatorKind
from mora_ds.common.errors import RunError, UserError
from mora_ds.models.loss import chunk_loss
from mora_ds.train.init_adapter import InitialAdapter
from mora_ds.train.preflight import check_domain_rows
from tests.helpers.adapters import Maker
from tests.helpers.domains import NAMES, domain_model, filled
from tests.helpers.models import tiny_model, tokens

KINDS = tuple(kind.value for kind in OperatorKind)


def row_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(rows,) summed next-token losses."""
    logits = model(input_ids=ids, use_cache=False).logits
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(ids), -1).sum(dim=1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """To within `tolerance` of the largest element."""
    assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def plain_of(model: Any, operator: str, family: str, cycle: int, domain: int) -> Any:
    """A model without domains whose matrices are M + M_k of one domain."""
    plain = tiny_model(family)
    inject(plain, MoRAConfig(rank=4, operator=operator, compute="activation"))
    for name, layer in mora_layers(plain).items():
        both = domain_layers(model)[name]
        assert both.own_spec == layer.spec == both.spec or cycle
        layer.square.data = both.square.data + both.domain_squares.data[domain]
    return plain


ROWS = ("code", "law", "prose", "code", "news", "law", "law", "prose")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("operator", KINDS)
def test_a_mixed_batch_is_what_one_model_a_domain_makes_of_its_rows(operator: str, family: str) -> None:
    """Losses of every row and gradients of every matrix, against one model for each domain with matrices M + M_k."""
    model, ids = domain_model(operator, family), tokens(len(ROWS), 12)
    domains_of(model).set(ROWS)
    found = row_losses(model, ids)
    found.sum().backward()
    mine = gradients(model)
    shared = {name: torch.zeros_like(layer.square) for name, layer in domain_layers(model).items()}
    for index, domain in enumerate(NAMES):
        chosen = torch.tensor([name == domain for name in ROWS])
        plain = plain_of(model, operator, family, 0, index)
        losses = row_losses(plain, ids[chosen])
        losses.sum().backward()
        assert torch.allclose(found[chosen], losses, rtol=1e-6)
        for name, layer in mora_layers(plain).items():
            assert_close(mine[f"{name}.domain_squares"][index], layer.square.grad)
            shared[name] += layer.square.grad
    for name, total in shared.items():
        assert_close(mine[f"{name}.square"], total)
        assert total.abs().max() > 1e-3


def test_checkpointing_computes_again_with_the_same_domains() -> None:
    """In backward, before and after a merge has changed the operator of the shared matrix."""
    ids = tokens(len(ROWS), 12)
    for cycle in (0, 1):
        found = []
        for checkpointing in (False, True):
            model = domain_model("rotate", cycle=cycle).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            domains_of(model).set(ROWS)
            row_losses(model, ids).sum().backward()
            found.append(gradients(model))
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, found[1][name], atol=1e-6), name


@pytest.mark.parametrize("operator", ["share", "rotate"])
def test_after_a_merge_rows_still_have_what_their_own_batches_have(operator: str) -> None:
    """Each row then takes two products: against batches of one domain, and against dense deltas."""
    rows = [name.replace("news", "code") for name in ROWS]
    model, ids = domain_model(operator, cycle=3), tokens(len(rows), 12)
    assert operator == "truncate" or all(layer.spec != layer.own_spec for layer in domain_layers(model).values())
    domains_of(model).set(rows)
    found = row_losses(model, ids)
    found.sum().backward()
    mixed = gradients(model)
    summed = {name: torch.zeros_like(gradient) for name, gradient in mixed.items()}
    for index, domain in enumerate(NAMES):
        chosen = torch.tensor([name == domain for name in rows])
        if not chosen.any():
            continue
        model.zero_grad()
        domains_of(model).set_all(domain)
        losses = row_losses(model, ids[chosen])
        losses.sum().backward()
        assert torch.allclose(found[chosen], losses, rtol=1e-6)
        for name, gradient in gradients(model).items():
            summed[name] += gradient
            if name.endswith("domain_squares"):
                others = [other for other in range(len(NAMES)) if other != index]
                assert not gradient[others].any(), "a domain's rows reach its own square alone"
        dense = copy.deepcopy(model)
        for layer in domain_layers(dense).values():
            update = delta_weight(layer.spec, layer.square.data)
            layer.write(layer.weight + update + delta_weight(layer.own_spec, layer.domain_squares.data[index]))
            layer.square.data.zero_()
        domains_of(dense).set_all(None)
        with torch.no_grad():
            assert torch.allclose(row_losses(dense.eval(), ids[chosen]), losses, rtol=1e-5)
    for name, gradient in mixed.items():
        assert torch.allclose(gradient, summed[name], rtol=1e-5, atol=1e-6), name
    assert not mixed[f"{next(iter(domain_layers(model)))}.domain_squares"][NAMES.index("news")].any(), "no row is of it"


def test_rows_by_index_and_none() -> None:
    spec = next(iter(domain_layers(domain_model("share")).values())).spec
    squares = torch.randn(3, spec.r_hat, spec.r_hat, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 5, spec.d_in, generator=torch.Generator().manual_seed(1))
    found = rows_of(spec, torch.tensor([2, -1, 0, 2]), squares, x)
    assert not found[1].any()
    for row, index in ((0, 2), (2, 0), (3, 2)):
        assert torch.allclose(found[row], mora_update(spec, squares[index], x[row]), atol=1e-5)


@pytest.mark.parametrize("kind", OperatorKind)
def test_gradients_of_rows(kind: OperatorKind) -> None:
    """By finite differences, also where r_hat is larger than a side, or divides none."""
    for d_in, d_out, r_hat in ((10, 7, 4), (3, 9, 6), (9, 3, 4), (5, 5, 8)):
        spec = OperatorSpec(kind, d_in, d_out, r_hat, Grouping.PERMUTED, seed=3)
        generator = torch.Generator().manual_seed(0)
        squares = torch.randn(3, r_hat, r_hat, dtype=torch.float64, generator=generator, requires_grad=True)
        x = torch.randn(3, 2, d_in, dtype=torch.float64, generator=generator, requires_grad=True)
        rows = torch.tensor([2, -1, 2])
        assert torch.autograd.gradcheck(lambda *each, spec=spec, rows=rows: rows_of(spec, rows, *each), (squares, x))


def rows_of(spec: OperatorSpec, rows: torch.Tensor, squares: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`update_rows` with a matrix for each row by its index; a negative index stands for none."""
    choice = (rows.unsqueeze(1) == torch.arange(len(squares))).to(squares.dtype)
    return update_rows(spec, squares_of_rows(squares, choice), x)


def test_a_row_without_a_square_is_refused_by_name() -> None:
    model, ids = domain_model("share"), tokens(2, 8)
    domains = domains_of(model)
    with pytest.raises(UserError, match=r"unknown domain 'lwa'; known: law, code, news, prose.*'law'"):
        domains.set(["code", "lwa"])
    with pytest.raises(UserError, match="unknown domain 'cooking'"):
        domains.set_all("cooking")
    with pytest.raises(RunError, match="training needs the domain of each row"):
        row_losses(model.train(), ids)
    domains.set(["law", "law", "code"])
    with pytest.raises(RunError, match="domains are set for 3 rows, but a layer reads"):
        row_losses(model, ids)
    with domains.using("law"):
        row_losses(model, ids)
    with pytest.raises(RunError, match="domains are set for 3 rows"):
        row_losses(model, ids)
    domains.set(["law", "code"])
    before = row_losses(model, ids)
    with domains.using("prose"):
        assert not torch.equal(row_losses(model, ids), before)
    assert torch.equal(row_losses(model, ids), before), "as it was set before"


@pytest.mark.parametrize("cycle", [0, 1])
def test_dropout_is_on_the_input_of_rows_squares_while_training(cycle: int) -> None:
    model, ids = domain_model("share", cycle=cycle, dropout=0.5), tokens(2, 8)
    domains_of(model).set(["law", "code"])
    for layer in domain_layers(model).values():
        layer.square.data.zero_()
    assert torch.equal(row_losses(model.eval(), ids), row_losses(model, ids))
    assert not torch.equal(row_losses(model.train(), ids), row_losses(model, ids))


class Wrapped:
    """The parts of an engine that the check uses."""

    device = "cpu"

    def __init__(self, module: Any) -> None:
        self.module, self.eval, self.train = module, module.eval, module.train

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)


def test_a_layer_that_does_not_see_complete_rows_is_refused() -> None:
    check_domain_rows(Wrapped(domain_model("rotate")), 128)
    model = domain_model("rotate", target_modules=("q_proj", "lm_head"))
    chunk_loss(model)
    with pytest.raises(
        UserError, match=r"--domain_adapters: domains are set for 3 rows, but a layer reads .*--target_modules"
    ):
        check_domain_rows(Wrapped(model), 128)


@pytest.mark.parametrize("name", ["..", "", "a/b", "a\\b", "a\nb", "x" * 300])
def test_a_name_that_no_checkpoint_could_be_read_with_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"--domain_adapters: .* cannot be a domain's name"):
        MoRAConfig(domains=("law", name))


def test_an_update_that_is_no_square_is_refused() -> None:
    config = MoRAConfig(domains=NAMES)
    with pytest.raises(UserError, match="q_proj would get lora"):
        layer_for(config, nn.Linear(4, 4), LoRASpec(4, 4, 2, 1.0), "q_proj", Domains(NAMES))


def test_squares_that_a_run_cannot_start_from_are_refused(tmp_path: Path) -> None:
    """Those of a run that trained other parameters too, and domains whose matrices would stay at zero."""
    maker = Maker(tiny_model("llama"), tmp_path / "base")
    shared = MoRAConfig(rank=4)
    maker.write(tmp_path / "plain", shared)
    maker.write(tmp_path / "other", shared, domains=("cooking",))
    maker.write(tmp_path / "norm", shared, trained={"model.norm.weight": torch.ones(32)})

    def opened(name: str, freeze: str, names: tuple[str, ...] = NAMES) -> InitialAdapter:
        model = tiny_model("llama")
        inject(model, MoRAConfig(rank=4, domains=names, freeze=freeze))
        return InitialAdapter.open(tmp_path / name, model, maker.reference.fingerprint)

    opened("plain", "shared")
    opened("other", "domains", ("law", "cooking"))
    with pytest.raises(UserError, match=r"--init_adapter .*norm: that run also trained model.norm.weight, which"):
        opened("norm", "none")
    for name, there in (("plain", "no domains"), ("other", "those of cooking")):
        with pytest.raises(UserError, match=f"matrices of law, code, news, prose at zero: that run has {there}"):
            opened(name, "domains")


@pytest.mark.parametrize("freeze", [Freeze.SHARED, Freeze.DOMAINS])
def test_frozen_squares_act_and_are_no_parameters(freeze: Freeze) -> None:
    free, ids = domain_model("rotate"), tokens(len(ROWS), 12)
    model = tiny_model("llama")
    report = inject(model, MoRAConfig(rank=4, operator="rotate", domains=NAMES, freeze=freeze.value))
    filled(model)
    gone = "square" if freeze is Freeze.SHARED else "domain_squares"
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    assert names == {"square", "domain_squares"} - {gone}
    assert report.trainable_params == sum(parameter.numel() for parameter in model.parameters())
    assert "frozen" in str(report) and "law, code, news, prose" in str(report)
    for each in (free, model):
        domains_of(each).set(ROWS)
    assert torch.equal(row_losses(free, ids), row_losses(model, ids))
    assert getattr(next(iter(domain_layers(model.to(torch.bfloat16)).values())), gone).dtype is torch.float32
