"""--liger: Liger's kernels give what the model's own layers give, in triton's interpreter; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mora_ds.common.errors import UserError
from mora_ds.train import liger, preflight, pretrain
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import REPOSITORY, Playground, job, refused

FAMILIES = ("qwen3_moe", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2")


def interpret(*families: str) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.helpers.fused", *families],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[-len(families) :]


def test_kernels_give_what_the_layers_of_the_model_give() -> None:
    assert interpret("llama", "mixtral") == ["llama", "mixtral"]


@pytest.mark.heavy
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_for_every_other_family(family: str) -> None:
    assert interpret(family) == [family]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mixtral", *FAMILIES])
def test_the_same_on_a_gpu(family: str) -> None:
    from tests.helpers.fused import check_family  # not above: it takes triton and Liger a second

    check_family(family, "cuda")


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--liger: .* on a GPU"):
        liger.check_liger(SimpleNamespace(model_type="llama"))
    monkeypatch.setattr(liger, "is_cpu", lambda: False)
    liger.check_liger(SimpleNamespace(model_type="llama"))
    with pytest.raises(UserError, match=r"--liger: .* no kernels for models of type gpt2"):
        liger.check_liger(SimpleNamespace(model_type="gpt2"))
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mora_ds\[liger\]'"):
        liger.check_liger(SimpleNamespace(model_type="llama"))


def with_norms_scaled(scale: float, function: Any, argv: list[str]) -> Any:
    """`function` of a run in which the kernels are stood in for by a last norm that is scaled."""

    def put(model: Any) -> None:
        norm = model.model.norm
        forward = norm.forward
        norm.forward = lambda x: scale * forward(x)

    preflight.use_liger = put  # type: ignore[assignment]
    pretrain.check_liger = lambda config: None
    return function(argv)


@pytest.mark.gloo
def test_a_run_keeps_its_kernels_and_wrong_ones_are_refused(user: Playground, tmp_path: Path) -> None:
    steps = ("--max_steps", 2, "--save_steps", 1, "--liger")
    ((_, message),) = run_ranks(1, with_norms_scaled, 1.01, refused, user.flags(tmp_path / "wrong", *steps))
    assert "--liger: Liger's kernels give logits 1.0% apart" in message
    (summary,) = run_ranks(1, with_norms_scaled, 1 + 1e-5, job, user.flags(tmp_path / "right", *steps))
    assert summary["steps"] == 2
    again = user.flags(tmp_path / "right", *steps[:-1], "--max_steps", 3, "--resume_from_checkpoint", "auto")
    ((_, message),) = run_ranks(1, with_norms_scaled, 1.0, refused, again)
    assert "--liger (None: without): True there, None here" in message
