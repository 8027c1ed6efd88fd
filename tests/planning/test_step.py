"""The inputs of a step's plan: figures of a config, layers that repeat, and weights
that are copied from the host."""

from types import SimpleNamespace

import pytest

from mora_ds.adapters.registry import ADAPTERS, loaded
from mora_ds.planning import step
from mora_ds.planning.step import StepMemory, Streamed, Work, layer_period, step_memory
from tests.helpers.models import tiny_model
from tests.helpers.tables import each_row, parsed


class Config(SimpleNamespace):
    def get_text_config(self):
        return self


def test_ranks_that_share_rows_have_a_part_of_the_tokens():
    config = Config(num_hidden_layers=3)
    work = Work(config, None, seq_len=30, micro_batch=4, sequence_parallel=2)
    assert (work.tokens, work.layers) == (60, 3)


@pytest.mark.parametrize(
    "buffers, on_device, copied", [(1, 40, 150), (2, 80, 100), (4, 160, 0)]
)
def test_layers_that_are_there_are_not_copied(buffers, on_device, copied):
    """The first ones from the end of the last backward pass, the last ones from the end of
    forward.
    """
    streamed = Streamed((10, 20, 30, 40), buffers, 40)
    assert (streamed.total, streamed.on_device, streamed.copied) == (
        100,
        on_device,
        copied,
    )


@pytest.mark.parametrize("adapter", ["mora", "lora", "subspace"])
def test_every_adapter_is_planned_on_a_base_in_4_bits(adapter):
    """A layer has a merged cycle there, whose adapter weight is complete."""
    config = loaded(ADAPTERS[adapter].config)(rank=4, base_bits=4)
    assert step_memory(Work(tiny_model().config, config, seq_len=16)).saved > 0


PERIODS = {1: "aaaaa a", 2: "abab ababa", 3: "abbabb abba abc aab"}


@pytest.mark.parametrize("period", PERIODS)
def test_kinds_of_layers_repeat(period):
    for kinds in PERIODS[period].split():
        config = Config(layer_types=list(kinds), num_hidden_layers=len(kinds))
        assert layer_period(config) == period, kinds


EXPERTS = """
{} | 1
{decoder_sparse_step: 1, mlp_only_layers: []} | 1
{decoder_sparse_step: 2} | 6
{mlp_only_layers: [1]} | 6
{first_k_dense_replace: 1} | 6
"""


@each_row("settings, period", EXPERTS)
def test_layers_that_differ_in_their_experts_do_not_repeat(settings, period):
    config = Config(num_hidden_layers=6, **parsed(settings))
    assert layer_period(config) == int(period)


@pytest.mark.parametrize("period", [1, 2, 3])
def test_the_memory_of_a_deep_model_is_that_of_all_its_layers(period, monkeypatch):
    """Each kind of layer takes its own; the deep model is never made."""
    depths = []

    def measure(model, work):
        text = work.config
        depths.append(text.num_hidden_layers)
        costs = [10 ** "abc".index(kind) for kind in text.layer_types]
        return StepMemory(saved=7 + sum(costs), peak=9 + 2 * sum(costs), tables=5)

    monkeypatch.setattr(step, "planned_model", lambda work: None)
    monkeypatch.setattr(step, "measure_step", measure)
    for layers in range(1, 24):
        kinds = ["abc"[n % period] for n in range(layers)]
        work = Work(Config(num_hidden_layers=layers, layer_types=kinds), None, 8)
        expected = measure(None, work)
        depths.clear()
        assert step_memory(work) == expected, layers
        assert len(depths) == (1 if layers <= 3 * period else 2)
        assert max(depths) <= 4 * period
    planned = SimpleNamespace(planned_layers=True)
    depths.clear()
    step_memory(Work(Config(num_hidden_layers=23, layer_types=["a"] * 23), planned, 8))
    assert depths == [23], "every layer may be different"
