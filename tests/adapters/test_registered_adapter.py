"""An adapter of another form, DoRA, registered by this file alone: trained, merged, resumed,
exported, and refused by its name where it lacks a capability.

    W' = m * V / |V|,  V = W + (alpha / r) B A          |.|: the norm of each row, arXiv 2402.09353

Its merge is no sum of deltas, and depends on the weight that it merges into.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from mora_ds.adapters import registry
from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.frozen import dense
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.registry import AdapterType
from mora_ds.checkpoint.layout import find_adapter
from mora_ds.config.arguments import parse
from mora_ds.config.validate import validate
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.combine import combine_adapters
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from mora_ds.engine.initialize import initialize
from mora_ds.models.base import BaseCheckpoint
from mora_ds.parallel.tensor_parallel import split_model
from mora_ds.parallel.topology import Topology
from mora_ds.remora.ledger import Ledger
from mora_ds.train.dry_run import planned
from tests.helpers.adapters import Maker
from tests.helpers.engines import ds_config, merging_run
from tests.helpers.errors import user_error
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import assert_close_losses, job, research
from tests.helpers.models import tiny_model, tokens
from tests.helpers.resume import assert_same_run, interrupted_job
from tests.helpers.tables import rows


@dataclass(frozen=True)
class DoRASpec(UpdateSpec):
    """The value is one row: [A | B^T] (rank, d_in + d_out), then m (d_out,)."""

    name: ClassVar[str] = "dora"
    value_name: ClassVar[str] = "direction"
    d_in: int
    d_out: int
    rank: int
    scale: float

    @property
    def value_shape(self):
        return (self.rank * (self.d_in + self.d_out) + self.d_out,)

    @property
    def size(self):
        return self.rank

    def parts(self, value):
        """A (rank, d_in), scale * B^T (rank, d_out), m (d_out, 1)."""
        factors, magnitude = value.split([len(value) - self.d_out, self.d_out])
        down, up = factors.view(self.rank, -1).split([self.d_in, self.d_out], 1)
        return down, up * self.scale, magnitude.unsqueeze(1)

    def init_weight(self, base_weight, seed):
        generator = torch.Generator().manual_seed(seed)
        down = torch.rand(self.rank, self.d_in, generator=generator) * 2 - 1
        factors = F.pad(down / math.sqrt(self.d_in), (0, self.d_out))
        magnitude = row_norms(dense(base_weight, torch.float32).float())
        return torch.cat((factors.flatten().to(magnitude.device), magnitude.flatten()))

    def merged_weight(self, base_weight, value):
        down, up, magnitude = self.parts(value)
        direction = base_weight.clone()
        for row, column in zip(down, up, strict=True):
            direction += column.unsqueeze(1) * row
        return direction * (magnitude / row_norms(direction))


def row_norms(weight):
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True)


class DoRALinear(AdaptedLinear):
    def forward(self, x):
        down, up, magnitude = self.spec.parts(self.direction.to(x.dtype))
        direction = dense(self.frozen, x.dtype) + up.T @ down
        weight = direction * (magnitude / row_norms(direction).detach())
        return F.linear(x, weight, self.bias)


@dataclass(frozen=True)
class DoRAConfig(AdapterConfig):
    adapter: ClassVar[str] = "dora"
    alpha: float | None = None

    def operator_for(self, layer, d_in, d_out, cycle):
        return DoRASpec(d_in, d_out, self.rank, (self.alpha or self.rank) / self.rank)


DORA = AdapterType(
    name="dora",
    title="DoRA",
    config=DoRAConfig,
    layer=DoRALinear,
    specs={"dora": DoRASpec},
    settings={"lora_alpha": "alpha"},
    trainables=("*layernorm.weight",),
)
CONFIG = DoRAConfig(rank=2)


@pytest.fixture
def dora():
    """Registered in this process; the other tests know nothing of it."""
    registry.register(DORA)
    yield
    registry.unregister("dora")


def registered(function, *arguments):
    """`function` where DoRA is registered. For `run_ranks`."""
    registry.register(DORA)
    return function(*arguments)


# -- training --------------------------------------------------------------------------

MERGING = (
    "--adapter dora --mora_rank 2 --lora_alpha 3 --max_steps 9 --merge_every 3 "
    "--restart_warmup_steps 1 --save_steps 2"
)


@pytest.fixture(scope="module")
def whole(user, tmp_path_factory):
    """The output folder of a run on two ranks under ZeRO-3, and its summary."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run_ranks(2, registered, job, user.flags(out, MERGING))[0]


def test_it_trains_under_zero_3_and_resumes_to_the_bit(user, whole, tmp_path):
    out, summary = whole
    assert (summary["merges"], summary["base_bytes_gathered"]) == (2, 0)
    before = summary["perplexity_before"]["held"]
    assert summary["perplexity_after"]["held"] < 0.99 * before, "it learns"
    argv = user.flags(tmp_path / "out", MERGING, "--resume_from_checkpoint auto")
    for step in (3, 5):  # right after a merge that is not saved yet, and in mid-cycle
        run_ranks(2, registered, interrupted_job, argv, step)
    run_ranks(2, registered, job, argv)
    assert_same_run(tmp_path / "out", out)
    alone = user.flags(tmp_path / "1", MERGING, "--per_device_train_batch_size 4")
    run_ranks(1, registered, job, alone)
    assert_close_losses(tmp_path / "1", out)


def by_hand(weight, spec, value):
    """A cycle's merged weight in fp64."""
    down, up, magnitude = spec.parts(value.double())
    direction = weight + up.T @ down
    return magnitude * direction / direction.norm(dim=1, keepdim=True)


def test_an_export_is_the_live_model(user, whole, tmp_path, dora):
    """Each cycle is merged into the weight that the one before has left."""
    out, _ = whole
    report = export_merged(out, tmp_path / "merged", verify=True)
    assert report.comparison is not None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    live = load_adapter(user.model, out)
    ids = tokens(3)
    torch.testing.assert_close(merged(ids).logits, live(ids).logits)
    base = BaseCheckpoint.open(user.model)
    ledger = Ledger.open(find_adapter(out) / "ledger")
    assert ledger.cycles == 2
    for name, layer in mora_layers(live).items():
        weight = base.read(f"{name}.weight").double()
        original = weight
        for spec, value in ledger.squares_of(name):
            weight = by_hand(weight, spec, value)
        torch.testing.assert_close(layer.weight.double(), weight)
        weight = by_hand(weight, layer.spec, layer.value.detach())
        exported = merged.get_parameter(f"{name}.weight").double()
        torch.testing.assert_close(exported, weight)
        assert not torch.allclose(exported, original)
    norms = {
        name for name, _ in live.named_parameters() if name.endswith("norm.weight")
    }
    assert len(norms) == 4, "each layer's two, and not the last one"


@pytest.mark.parametrize("stage, dtype", [(3, "float32"), (2, "bfloat16")])
def test_every_merge_is_that_of_the_original_in_fp32(tmp_path, stage, dtype, dora):
    """Rounded once, to the bit."""
    arguments = (str(tmp_path), CONFIG, stage, dtype, 3)
    ranks = run_ranks(2, registered, merging_run, *arguments)
    base = BaseCheckpoint.open(tmp_path / "base")
    ledger = Ledger.open(tmp_path / "out/ledger")
    for name, weight in ranks[0]["weights"].items():
        expected = base.read(f"{name}.weight").float()
        for spec, value in ledger.squares_of(name):
            expected = spec.merged_weight(expected, value)
        assert torch.equal(weight, expected.to(weight.dtype)), name
        assert torch.equal(ranks[1]["weights"][name], weight), name
    report = ranks[0]["reports"][-1]
    assert report["loss_after"] == pytest.approx(report["loss_before"], rel=1e-3)
    assert 0 < report["delta_norm"] < report["weight_norm"]
    assert (report["rounding_loss"] == 0) == (dtype == "float32")


def test_a_dry_run_plans_it(user, tmp_path, dora):
    plan, lines = planned(parse(user.flags(tmp_path, MERGING)), 2)
    assert "operator dora" in lines[0]
    assert "rank" in lines[0].splitlines()[0]
    assert str(plan)


# -- what it does not support ----------------------------------------------------------

REFUSED = """
--tensor_parallel_size 2 | --tensor_parallel_size 2: --adapter dora does not support tensor parallelism
--base_bits 8 | --base_bits 8: --adapter dora does not support a base in 8 bits
--base_bits 4 | --base_bits 4: --adapter dora does not support a base in 4 bits
--target_modules experts | --target_modules names experts: --adapter dora does not support experts
--optimizer muon | --optimizer muon: --adapter dora does not support Muon
--operator share | --operator is for MoRA \\(--adapter mora\\)
"""


@pytest.mark.parametrize("flags, message", rows(REFUSED))
def test_a_setting_that_it_does_not_support(user, tmp_path, dora, flags, message):
    argv = user.flags(tmp_path, "--adapter dora --mora_rank 2", flags)
    with user_error(message):
        validate(parse(argv))


def test_research_settings_that_it_does_not_support(user, tmp_path, dora):
    for name, value in {"targets": "plan.yaml", "domain_adapters": True}.items():
        argv = research(
            user.flags(tmp_path, "--adapter dora"), tmp_path, **{name: value}
        )
        with user_error(f"research.{name}: --adapter dora does not support"):
            validate(parse(argv))


def test_calls_that_it_does_not_support(tmp_path, dora):
    model = tiny_model()
    inject(model, CONFIG)
    adapter = tmp_path / "adapter"
    new = tmp_path / "new"
    Maker(tiny_model(), tmp_path / "base").write(adapter, CONFIG)
    muon = ds_config(3, 1, optimizer={"type": "Muon", "params": {"lr": 0.1}})
    experts = replace(CONFIG, target_modules=("experts",))
    for call in (
        lambda: replace(CONFIG, base_bits=8),
        lambda: inject(tiny_model("mixtral"), experts),
        lambda: split_model(model, Topology(2, 0, None)),
        lambda: initialize(model=model, config=muon),
        lambda: export_peft(adapter, new, rank=2),
        lambda: export_merged(adapter, new, delta_scale=0.5),
        lambda: export_merged(adapter, new, onto=tmp_path / "base"),
        lambda: combine_adapters([adapter, adapter], [1, 1], new),
    ):
        with user_error("--adapter dora does not support"):
            call()
        assert not new.exists()


# -- what nobody registered ------------------------------------------------------------


def test_an_adapter_that_is_not_registered(user, tmp_path):
    """In settings, in a checkpoint and in Python."""
    registry.register(DORA)
    adapter = tmp_path / "adapter"
    Maker(tiny_model(), tmp_path / "base").write(adapter, CONFIG, cycles=1)
    ledger = adapter / "ledger"
    registry.unregister("dora")
    argv = user.flags(tmp_path / "out", "--adapter dora")
    with user_error("unknown --adapter 'dora'; known: mora, lora, full, none"):
        validate(parse(argv))
    with user_error("adapter.json: unknown adapter 'dora'; known: mora, lora"):
        export_merged(adapter, tmp_path / "new")
    with user_error("unknown adapter 'dora'; known: mora, lora"):
        inject(tiny_model(), CONFIG)
    with user_error("unknown operator 'dora'; known: truncate, "):
        Ledger.open(ledger)


def test_names_are_registered_once(dora, capsys):
    class Changed(MoRAConfig):
        """Of another class than the one under its name."""

    with user_error("a Changed, and adapter 'mora' is registered with another"):
        inject(tiny_model(), Changed(rank=4))
    for name, taken in (("dora", "'dora' already"), ("full", "'full' already")):
        with user_error(taken):
            registry.register(replace(DORA, name=name))
    with user_error("another one has specs of kind 'dora'"):
        registry.register(replace(DORA, name="other"))
    with pytest.raises(SystemExit):
        parse(["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Adapters: mora (MoRA), lora (LoRA), dora (DoRA)." in text
    with user_error(r"unknown adapter 'dor'.* Did you mean 'dora'"):
        registry.unregister("dor")
