"""Every forward pass of a run is training's, or one of `eval_mode`: nothing of a
training batch acts on it.
"""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.domains import Domains, domains_of
from mora_ds.adapters.inject import inject
from mora_ds.commands.pretrain import train
from mora_ds.config.arguments import parse
from mora_ds.train import training_setup
from mora_ds.train.non_fatal import eval_mode
from tests.helpers.gloo import run_alone
from tests.helpers.jobs import research
from tests.helpers.mixtures import mixture_flags, write_mixture
from tests.helpers.models import tiny_model, tokens
from tests.helpers.tasks import task_files


def test_what_layers_read_is_set_and_put_back_even_after_an_error():
    model = tiny_model("llama")
    inject(model, MoRAConfig(rank=4, dropout=0.5, domains=("new", "old")))
    model.train()
    domains = domains_of(model)
    domains.set(["old", "new", "new"])
    with pytest.raises(KeyError), eval_mode(model, "old"):
        with eval_mode(model):
            assert domains.choice(torch.ones(1, 2, 3)) is None
        assert torch.equal(
            domains.choice(torch.ones(1, 2, 3)), torch.tensor([[0.0, 1.0]])
        )
        assert not model.training
        first, second = (model(input_ids=tokens(2)).logits for _ in range(2))
        assert torch.equal(first, second), "no dropout"
        assert not first.requires_grad
        raise KeyError
    assert model.training and torch.is_grad_enabled()
    assert torch.equal(
        domains.choice(torch.ones(3, 2, 3)),
        torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]),
    )


@contextmanager
def rows_that_stay(domains, sources):
    """`Domains.of_rows` that leaves the domains of a training batch as they were in it."""
    domains.set(sources)
    yield


def kinds_of_passes(argv):
    """Passes of a run's model by (training mode, gradients, domains of no single rows);
    each of them finds what a batch of other rows has set before it. For `run_ranks`."""
    kinds = Counter()

    def injected(model):
        domains = domains_of(model)
        domains.set(["new"] * 7)
        return domains

    def note(module, inputs):
        if isinstance(module, LlamaForCausalLM):
            domains = domains_of(module)
            is_reset = domains._choice is None or domains._same_for_all
            kinds[module.training, torch.is_grad_enabled(), is_reset] += 1

    register_module_forward_pre_hook(note)
    rows = mock.patch.object(Domains, "of_rows", rows_that_stay)
    with rows, mock.patch.object(training_setup, "domains_of", injected):
        train(parse(argv))
    return kinds


def test_each_pass_of_a_run_sets_what_layers_read(user, tmp_path, out):
    """Checks before the first step, evaluations, tasks, probes of saves and merges, and the
    recorded probe.
    """
    mix = write_mixture(user, tmp_path / "mix.yaml")
    argv = mixture_flags(
        user,
        out,
        mix,
        "--max_steps 3 --save_steps 2 --eval_steps 1 --merge_every 2 --restart_warmup_steps 1",
        "--mora_dropout 0.1 --report_to none --trust_remote_code --eval_tasks",
        task_files(tmp_path)["choices"],
    )
    kinds = run_alone(kinds_of_passes, research(argv, tmp_path, domain_adapters=True))
    assert kinds.pop((False, False, False)) == 1, (
        "a check of rows before the first step"
    )
    of_training = kinds.pop((True, True, False))
    assert {*kinds} == {(False, False, True)}, kinds
    assert kinds.total() > of_training >= 3
