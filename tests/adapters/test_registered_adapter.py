"""An adapter of another form, DoRA, registered by this file alone: trained, merged, resumed,
exported, and refused by its name where it lacks a capability.

    W' = m * V / |V|,  V = W + (alpha / r) B A          |.|: the norm of each row, arXiv 2402.09353

Its merge is no sum of deltas, and depends on the weight that it merges into.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mora_ds.adapters import registry
from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.frozen import dense
from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.config.arguments import from_flat, parse
from mora_ds.config.validate import validate
from mora_ds.deploy.combine import combine_adapters
from mora_ds.deploy.export import export_merged
from mora_ds.deploy.peft_export import export_peft
from mora_ds.engine.initialize import initialize
from mora_ds.models.base import BaseCheckpoint
from mora_ds.parallel.tensor_parallel import split_model
from mora_ds.parallel.topology import Topology
from mora_ds.remora.ledger import Ledger
from tests.helpers.adapters import Maker
from tests.helpers.engines import ds_config
from tests.helpers.errors import user_error
from tests.helpers.exports import exported_and_live
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import job
from tests.helpers.models import tiny_model
from tests.helpers.resume import MERGING_BF16, assert_same_run, interrupted_job
from tests.helpers.tables import each_row


@dataclass(frozen=True)
class DoRASpec(UpdateSpec):
    """The adapter weight is one row: LoRA's [A | B^T] (rank, d_in + d_out), then m (d_out,)."""

    name: ClassVar[str] = "dora"
    adapter_weight_name: ClassVar[str] = "direction"
    d_in: int
    d_out: int
    rank: int
    alpha: float

    @property
    def adapter_weight_shape(self):
        return (self.rank * (self.d_in + self.d_out) + self.d_out,)

    @property
    def size(self):
        return self.rank

    @property
    def lora(self):
        return LoRASpec(self.d_in, self.d_out, self.rank, self.alpha)

    def parts(self, adapter_weight):
        """LoRA's factors, and m (d_out, 1)."""
        factors = adapter_weight[: -self.d_out].view(self.rank, -1)
        return factors, adapter_weight[-self.d_out :].unsqueeze(1)

    def init_weight(self, base_weight, seed):
        magnitude = row_norms(dense(base_weight, torch.float32).float())
        factors = self.lora.init_weight(base_weight, seed).to(magnitude.device)
        return torch.cat((factors.flatten(), magnitude.flatten()))

    def merged_weight(self, base_weight, adapter_weight):
        factors, magnitude = self.parts(adapter_weight)
        direction = self.lora.merged_weight(base_weight, factors)
        return direction * (magnitude / row_norms(direction))


def row_norms(weight):
    return torch.linalg.vector_norm(weight, dim=1, keepdim=True)


class DoRALinear(AdaptedLinear):
    def forward(self, x):
        adapter_weight = self.direction.to(x.dtype)
        weight = self.spec.merged_weight(dense(self.frozen, x.dtype), adapter_weight)
        return F.linear(x, weight, self.bias)


@dataclass(frozen=True)
class DoRAConfig(AdapterConfig):
    adapter: ClassVar[str] = "dora"
    alpha: float | None = None

    def operator_for(self, layer, d_in, d_out, cycle):
        return DoRASpec(d_in, d_out, self.rank, self.alpha or 1.0)


DORA = registry.AdapterType(
    name="dora",
    title="DoRA",
    config=DoRAConfig,
    layer=DoRALinear,
    specs={"dora": DoRASpec},
    settings=("lora_alpha",),
    trainables=("*layernorm.weight",),
)
CONFIG = DoRAConfig(rank=2)


@pytest.fixture
def dora():
    """Registered in this process; the other tests know nothing of it."""
    registry.register(DORA)
    yield
    registry.ADAPTERS.pop("dora", None)


def registered(function, *arguments):
    """`function` where DoRA is registered. For `run_ranks`."""
    registry.register(DORA)
    return function(*arguments)


# -- a run -----------------------------------------------------------------------------

MERGING = f"--lora_alpha 3 {MERGING_BF16} --mora_rank 2 --adapter"


@pytest.mark.parametrize("adapter", ["dora", "lora"])
def test_a_run_on_two_ranks_under_zero_3(user, tmp_path, out, merged, dora, adapter):
    """Resumed to the bit, right after a merge that is not saved yet, and in mid-cycle; its
    export is the live model, and each cycle is merged into the weight that the one before
    has left, from the original one in fp32, rounded once."""
    summary = run_ranks(2, registered, job, user.flags(out, MERGING, adapter))[0]
    resumed = tmp_path / "resumed"
    argv = user.flags(resumed, MERGING, adapter, "--resume_from_checkpoint auto")
    for step in (3, 5):
        run_ranks(2, registered, interrupted_job, argv, step)
    run_ranks(2, registered, job, argv)
    assert_same_run(resumed, out)

    exported, live = exported_and_live(user, out, merged, summary)
    values = load_file(out / "checkpoints/latest/adapter.safetensors")
    base = BaseCheckpoint.open(user.model)
    ledger = Ledger.open(out / "ledger")
    for name, layer in mora_layers(live).items():
        weight = base.read(f"{name}.weight").float()
        exact = weight.double()
        for spec, adapter_weight in ledger.mora_matrices_of(name):
            weight = spec.merged_weight(weight, adapter_weight)
            exact = BY_HAND[adapter](exact, spec, adapter_weight)
        torch.testing.assert_close(weight, exact.float())
        assert torch.equal(layer.weight, weight.bfloat16()), name
        adapter_weight = values[f"{name}.{layer.spec.adapter_weight_name}"]
        weight = layer.spec.merged_weight(weight, adapter_weight)
        assert torch.equal(exported.get_parameter(f"{name}.weight"), weight.bfloat16())
    norms = [name for name in values if name.endswith("layernorm.weight")]
    assert len(norms) == (4 if adapter == "dora" else 0), "two in each layer"


def lora_by_hand(weight, spec, factors):
    """A cycle's merged weight in fp64."""
    down, up = factors.double().split([spec.d_in, spec.d_out], 1)
    return weight + spec.alpha / spec.rank * up.T @ down


def dora_by_hand(weight, spec, adapter_weight):
    factors, magnitude = spec.parts(adapter_weight)
    direction = lora_by_hand(weight, spec, factors)
    return magnitude * direction / direction.norm(dim=1, keepdim=True)


BY_HAND = {"dora": dora_by_hand, "lora": lora_by_hand}


# -- what it does not support ----------------------------------------------------------

REFUSED = """
--tensor_parallel_size 2 | --tensor_parallel_size 2: --adapter dora does not support tensor parallelism
--base_bits 8 | --base_bits 8: --adapter dora does not support a base in 8 bits
--base_bits 4 | --base_bits 4: --adapter dora does not support a base in 4 bits
--target_modules experts | --target_modules names experts: --adapter dora does not support experts
--optimizer muon | --optimizer muon: --adapter dora does not support Muon
--operator share | --operator is for MoRA
"""


@each_row("flags, message", REFUSED)
def test_a_setting_that_it_does_not_support(user, out, dora, flags, message):
    with user_error(message):
        validate(parse(user.flags(out, "--adapter dora", flags)))


def test_calls_that_it_does_not_support(tmp_path, dora):
    model = tiny_model()
    inject(model, CONFIG)
    adapter = tmp_path / "adapter"
    new = tmp_path / "new"
    Maker(tiny_model(), tmp_path / "base").write(adapter, CONFIG)
    muon = ds_config(3, 1, optimizer={"type": "Muon", "params": {"lr": 0.1}})
    experts = replace(CONFIG, target_modules=("experts",))
    domains = {"adapter": "dora", "research": {"domain_adapters": True}}
    for call in (
        lambda: replace(CONFIG, base_bits=8),
        lambda: validate(from_flat(domains)),
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


def test_an_adapter_that_is_not_registered(tmp_path, capsys, dora):
    """In settings, in a checkpoint and in Python."""
    adapter = tmp_path / "adapter"
    Maker(tiny_model(), tmp_path / "base").write(adapter, CONFIG, cycles=1)
    with user_error("there is an adapter 'dora' already"):
        registry.register(DORA)
    with pytest.raises(SystemExit):
        parse(["-h"])
    assert "lora, subspace, dora, full, none" in " ".join(
        capsys.readouterr().out.split()
    )
    del registry.ADAPTERS["dora"]

    class Changed(MoRAConfig):
        """Of another class than the one under its name."""

    with user_error("adapter 'mora' is registered with another class"):
        inject(tiny_model(), Changed(rank=4))
    for message, call in {
        "unknown --adapter 'dora'; known: mora, lora, subspace, full, none": (
            lambda: validate(from_flat({"adapter": "dora"}))
        ),
        "adapter.json: unknown adapter 'dora'; known: mora, lora, subspace": (
            lambda: export_merged(adapter, tmp_path / "new")
        ),
        "unknown adapter 'dora'": lambda: inject(tiny_model(), CONFIG),
        r"cycle-00000\.safetensors: .*unknown operator 'dora'; known: truncate": (
            lambda: Ledger.open(adapter / "ledger")
        ),
    }.items():
        with user_error(message):
            call()
