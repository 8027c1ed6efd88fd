"""A run says what share of its GPUs' arithmetic it uses, where that is known."""

from types import SimpleNamespace

import pytest

from mora_ds.planning.utilization import token_flops
from mora_ds.train import training_setup
from mora_ds.train.training_setup import TrainingSetup
from tests.helpers.models import tiny_model

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    "card, bf16, said, peak",
    [
        (H100, True, "at most 989 TFLOP/s", 989e12),
        (H100, False, "no MFU, as its peak in float32 is not known", None),
        ("NVIDIA X1", True, "no MFU, as its peak in bfloat16 is not known", None),
        ("", True, "", None),
    ],
)
def test_utilization(card, bf16, said, peak, monkeypatch):
    lines = []
    monkeypatch.setattr(training_setup, "card_name", lambda: card)
    monkeypatch.setattr(training_setup.logger, "info", lines.append)
    setup = TrainingSetup.__new__(TrainingSetup)
    model = tiny_model("llama")
    vars(setup).update(
        ds_config={"bf16": {"enabled": bf16}},
        loaded=SimpleNamespace(model=model),
        data=SimpleNamespace(train=SimpleNamespace(seq_len=64)),
        context=SimpleNamespace(ranks=SimpleNamespace(world=4)),
    )
    setup._count_flops()
    share = setup.utilization(1e9)
    assert share == (peak and pytest.approx(1e9 * token_flops(model, 64) / 4 / peak))
    assert "".join(lines).endswith(f"G a token; {card}: {said}" if card else "")
    assert bool(lines) == bool(card)
