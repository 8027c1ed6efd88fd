"""--layerwise_scaling: the measured scales, and runs that have them."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers, scale_layers
from mora_ds.data.packing import stack
from mora_ds.deploy.export import export_merged
from mora_ds.remora.ledger import Ledger
from mora_ds.train.layer_scales import SEQUENCES, measured_scales
from tests.helpers.errors import user_error
from tests.helpers.jobs import assert_close_losses, finished_run, run
from tests.helpers.jobs import validation_errors_of as errors_of
from tests.helpers.models import tiny_model, tokens
from tests.helpers.resume import assert_one_run
from tests.helpers.tables import heavy

SCALED = "--layerwise_scaling --learning_rate 5e-3 --save_steps 2"
REMORA = f"{SCALED} --max_steps 6 --merge_every 3 --restart_warmup_steps 1"


class Text:
    """A source of random sequences, and the mixture of this source alone."""

    def __init__(self):
        self.sources = [self]

    def peek(self, index):
        ids = tokens(1, seed=index)[0].numpy()
        positions = torch.arange(len(ids)).numpy()
        return {"input_ids": ids, "labels": ids, "position_ids": positions}


def injected(config, family="llama"):
    model = tiny_model(family)
    inject(model, config)
    return model


def measured(model):
    return measured_scales(model, Text(), torch.device("cpu"))


# -- the number ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MoRAConfig(rank=4), LoRAConfig(rank=4)])
def test_a_step_of_signs_moves_every_layer_by_the_learning_rate(config):
    """RMS(update of x) / RMS(W0 x) over the measured text, where each element that
    starts at zero is the learning rate or minus it."""
    rate = 1e-3
    generator = torch.Generator().manual_seed(3)
    model = injected(config, "gpt2")
    scale_layers(model, measured(model))
    energies = {name: [0.0, 0.0] for name in mora_layers(model)}

    def add(name, layer, args, output):
        first = layer.adapter_weight.data
        signs = torch.randint(2, first.shape, generator=generator) * 2.0 - 1
        delta = layer.spec.delta_weight(torch.where(first == 0, rate * signs, first))
        energies[name][0] += F.linear(args[0], delta).square().sum().item()
        frozen = F.linear(args[0], layer.stored_weight)
        energies[name][1] += frozen.square().sum().item()

    for name, layer in mora_layers(model).items():
        layer.register_forward_hook(partial(add, name))
    with torch.no_grad():
        for index in range(SEQUENCES):
            model(stack([Text().peek(index)])["input_ids"])
    for name, (update, frozen) in energies.items():
        # With other signs than those of the measurement
        assert math.sqrt(update / frozen) == pytest.approx(rate, rel=0.3), name


def test_measuring_changes_nothing_and_gives_the_same_numbers_again():
    model = injected(MoRAConfig(rank=4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = measured(model)
    assert first == measured(model)
    assert first.keys() == mora_layers(model).keys()
    assert len(set(first.values())) > 3
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_layer_without_output_is_named():
    model = injected(MoRAConfig(rank=4))
    name, layer = next(iter(mora_layers(model).items()))
    layer.weight.zero_()
    with user_error(f"--layerwise_scaling: {name} has no scale"):
        measured(model)


# -- runs ------------------------------------------------------------------------------


@pytest.mark.heavy(seconds=25)
@pytest.mark.parametrize("adapter", ["mora", "lora"])
def test_a_run_is_one_run_at_any_number_of_ranks_and_after_every_stop(
    user, tmp_path, adapter
):
    def flags(out, *more):
        return user.flags(out, f"--adapter {adapter}", REMORA, *more)

    assert_one_run(flags, tmp_path)


@pytest.fixture(scope="module", params=["mora", heavy("lora")])
def finished(request, user, tmp_path_factory):
    """(adapter, output folder) of a run with a merge."""
    out = finished_run(2, user, tmp_path_factory, f"--adapter {request.param}", REMORA)
    return request.param, out


def test_the_files_of_a_run_have_the_scales_and_export_what_it_computes(
    finished, merged
):
    adapter, out = finished
    latest = out / "checkpoints/latest"
    content = json.loads((latest / "adapter.json").read_text())
    scales = content["config"]["layer_scales"]
    assert scales.keys() == content["layers"].keys()
    assert len(set(scales.values())) > 3
    for name, entry in Ledger.open(latest / "ledger").layers(0).items():
        number = entry.operator.alpha / 4 if adapter == "lora" else entry.operator.scale
        assert number == pytest.approx(scales[name])
    assert export_merged(out, merged, verify=True).cycles == 1


@pytest.fixture(scope="module")
def plain(user, tmp_path_factory):
    """A finished run without scales."""
    return finished_run(1, user, tmp_path_factory, "--max_steps 2 --save_steps 2")


def test_a_resumed_run_keeps_what_it_began_with(user, plain, finished):
    resume = "--resume_from_checkpoint auto --max_steps 8"
    message = errors_of(user.flags(plain, resume, "--layerwise_scaling"))
    assert "belongs to a run without --layerwise_scaling" in message
    adapter, out = finished
    message = errors_of(user.flags(out, f"--adapter {adapter}", resume))
    assert "belongs to a run with --layerwise_scaling: go on as it began" in message


def test_a_run_without_scales_has_none_in_its_files(plain):
    text = (plain / "checkpoints/latest/adapter.json").read_text()
    assert "layer_scales" not in text
    assert '"scale"' not in text


@pytest.mark.heavy(seconds=40)
@pytest.mark.parametrize(
    "more",
    [
        "--tensor_parallel_size 2 --per_device_train_batch_size 4",
        "--sequence_parallel_size 2 --per_device_train_batch_size 4",
    ],
)
def test_split_runs_have_the_scales_of_one_rank(user, tmp_path, more):
    alone = tmp_path / "alone"
    split = tmp_path / "split"
    run(1, user.flags(alone, REMORA, "--per_device_train_batch_size 4"))
    run(2, user.flags(split, REMORA, more))
    assert_close_losses(split, alone)
    paths = [out / "checkpoints/latest/adapter.json" for out in (alone, split)]
    configs = [json.loads(path.read_text())["config"] for path in paths]
    assert configs[0] == configs[1]


def test_what_has_no_layers_has_no_scales(user, out):
    message = errors_of(user.flags(out, "--layerwise_scaling --adapter full"))
    assert "--layerwise_scaling is for an adapter (--adapter mora, lora)" in message
