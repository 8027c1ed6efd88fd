"""--layerwise_scaling: the measured scales, and runs that have them."""

import json
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mora_ds.adapters.config import LoRAConfig, MoRAConfig
from mora_ds.adapters.inject import inject, mora_layers, scale_layers
from mora_ds.deploy.export import export_merged
from mora_ds.remora.ledger import Ledger
from mora_ds.train.layer_scales import measured_scales
from tests.helpers import plain_kernels  # noqa: F401  (the kernels' operations, for tensors of a CPU)
from tests.helpers.errors import user_error
from tests.helpers.jobs import assert_close_losses, finished_run, run
from tests.helpers.jobs import validation_errors_of as errors_of
from tests.helpers.models import tiny_model, tokens
from tests.helpers.resume import assert_one_run
from tests.helpers.tables import heavy

SCALED = "--layerwise_scaling --learning_rate 5e-3 --save_steps 2"
REMORA = f"{SCALED} --max_steps 6 --merge_every 3 --restart_warmup_steps 1"


def block(index):
    """A sequence of random tokens that are one document."""
    ids = tokens(1, seed=index)[0].numpy()
    return {"input_ids": ids, "labels": ids, "position_ids": np.arange(len(ids))}


def measured(model):
    text = SimpleNamespace(sources=[SimpleNamespace(peek=block)])
    return measured_scales(model, text, torch.device("cpu"))


def injected(config):
    model = tiny_model("gpt2")  # with biases, and weights that are transposed
    inject(model, config)
    return model


# -- the number ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [MoRAConfig(rank=4), LoRAConfig(rank=4)])
def test_a_scale_is_what_the_weight_gives_over_what_random_signs_give(config):
    model = injected(config)
    inputs = defaultdict(list)
    for name, layer in mora_layers(model).items():
        layer.register_forward_pre_hook(
            lambda _, arguments, name=name: inputs[name].extend(arguments[0])
        )
    scales = measured(model)
    for name, layer in mora_layers(model).items():
        first = layer.adapter_weight.data
        signs = torch.randn(first.shape).sign()  # others than those of the measurement
        delta = layer.spec.delta_weight(torch.where(first == 0, signs, first))
        x = torch.cat(inputs[name])
        ratio = (x @ layer.stored_weight.T).norm() / (x @ delta.T).norm()
        assert scales[name] == pytest.approx(ratio.item(), rel=0.3), name


def test_measuring_changes_nothing_and_gives_the_same_numbers_again():
    model = injected(MoRAConfig(rank=4)).train()
    first = measured(model)
    assert first == measured(model)
    assert model.training
    assert not any(layer.adapter_weight.any() for layer in mora_layers(model).values())
    scale_layers(model, first)
    assert measured(model) == pytest.approx(dict.fromkeys(first, 1.0), rel=0.01)


def test_measuring_by_kernels_leaves_no_module(monkeypatch):
    """Rank 0 measures alone, and ZeRO-3 stops where ranks have different modules."""
    monkeypatch.setattr("mora_ds.adapters.layer.KERNEL_DEVICES", ("cpu",))
    model = injected(MoRAConfig(rank=4))
    before = dict(model.named_modules())
    by_kernels = measured(model)
    assert dict(model.named_modules()) == before
    monkeypatch.undo()
    assert by_kernels == pytest.approx(measured(model), rel=0.01)


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
    for name, entry in Ledger.open(latest / "ledger").layers(0).items():
        number = entry.operator.alpha / 4 if adapter == "lora" else entry.operator.scale
        assert number == pytest.approx(scales[name])
    assert export_merged(out, merged, verify=True).cycles == 1


def test_a_resumed_run_keeps_the_scales(user, finished):
    adapter, out = finished
    resume = f"--adapter {adapter} --resume_from_checkpoint auto --max_steps 8"
    message = errors_of(user.flags(out, resume))
    assert "belongs to a run with --layerwise_scaling: go on as it began" in message


@pytest.mark.heavy(seconds=20)
def test_a_run_of_tensor_parallel_ranks_is_that_of_one_rank(user, tmp_path):
    alone = tmp_path / "alone"
    split = tmp_path / "split"
    rows = "--per_device_train_batch_size 4"
    run(1, user.flags(alone, REMORA, rows))
    run(2, user.flags(split, REMORA, rows, "--tensor_parallel_size 2"))
    assert_close_losses(split, alone)
    name = "checkpoints/latest/adapter.json"
    assert (split / name).read_text() == (alone / name).read_text()
