"""Domains on real ranks: ZeRO against one process, complete runs with merges, resumes, exports, frozen matrices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mora_ds
from mora_ds.adapters.domains import domain_layers, domains_of
from mora_ds.adapters.inject import set_cycle
from mora_ds.adapters.ops.mora import delta_weight
from mora_ds.checkpoint.verify import verify
from mora_ds.common.errors import UserError
from mora_ds.config.arguments import from_flat
from mora_ds.config.domains import eval_domains
from mora_ds.config.validate import validate
from mora_ds.deploy.adapter_io import load_adapter
from mora_ds.deploy.export import export_merged
from mora_ds.engine import zero
from mora_ds.engine.initialize import initialize
from mora_ds.eval.perplexity import load_target
from tests.helpers.domains import domain_model
from tests.helpers.engines import ACCUMULATION, CLIP, EPSILON, LEARNING_RATE, STEPS, ds_config
from tests.helpers.gloo import run_ranks
from tests.helpers.jobs import REPOSITORY, Playground, losses, printed, refusal, refused, run
from tests.helpers.mixtures import mixture_flags, write_mixture
from tests.helpers.models import causal_loss, tokens
from tests.helpers.resume import assert_same_run, checkpoint_tensors, interrupted_job, stop_and_resume

pytestmark = pytest.mark.gloo

NAMES = ("new", "old", "third")
MICRO = 3
CONFIG = mora_ds.MoRAConfig(rank=4, operator="share", domains=NAMES)


def row_domains(step: int, count: int) -> list[str]:
    """The domain of each row of a step; the last domain has no row in the first step."""
    return [NAMES[(row * row + step) % (3 if step else 2)] for row in range(count)]


def merge(engine: Any, layers: dict[str, Any], whole: Any) -> None:
    """A merge of the shared MoRA matrices, written out. `whole`: gives the complete fp32 value of a parameter."""
    for layer in layers.values():
        layer.weight += delta_weight(layer.spec, whole(layer.square))
    if engine is not None:
        zero.reset_group(engine, 0, [layer.square for layer in layers.values()], lambda key, value: value.zero_())


def plain_run(world: int) -> dict[str, torch.Tensor]:
    """One process, the whole global batch at once; a merge after the second step."""
    model, rows = domain_model("share", names=NAMES), MICRO * world * ACCUMULATION
    layers, found = domain_layers(model), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)
    for step in range(STEPS):
        domains_of(model).set(row_domains(step, rows))
        loss = causal_loss(model, tokens(rows, seed=step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss {step}"] = loss.detach()
        if step == 1:
            merge(None, layers, lambda square: square.data)
            for layer in layers.values():
                layer.square.data.zero_()
                optimizer.state.pop(layer.square)
            set_cycle(model, CONFIG, 1)
    return found | {name: parameter.data for name, parameter in model.named_parameters()}


def sharded_run(stage: int) -> dict[str, torch.Tensor]:
    """The same on this rank of several, with accumulation and checkpointing."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = domain_model("share", names=NAMES)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine, *_ = initialize(model=model, config=ds_config(stage, MICRO), node_base="private")  # each merges by hand
    layers, found = domain_layers(model), {}
    for step in range(STEPS):
        ids = tokens(MICRO * world * ACCUMULATION, seed=step).view(ACCUMULATION, world, MICRO, -1)
        names = row_domains(step, MICRO * world * ACCUMULATION)
        total = torch.zeros(())
        for index in range(ACCUMULATION):
            first = (index * world + rank) * MICRO
            domains_of(model).set(names[first : first + MICRO])
            loss = causal_loss(engine, ids[index, rank])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / ACCUMULATION
        dist.all_reduce(total)
        found[f"loss {step}"] = total / world
        if step == 1:
            merge(engine, layers, lambda square: zero.full_fp32(engine, square))
            set_cycle(model, CONFIG, 1)
    if stage == 3:
        whole = sum(layer.domain_squares.ds_tensor.numel() for layer in layers.values())  # type: ignore[attr-defined]
        assert whole < sum(layer.domain_squares.ds_numel for layer in layers.values()), "sharded"  # type: ignore[attr-defined]
    return found | {name: zero.full_fp32(engine, value) for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("world", "stage"),
    [(2, 3), *(pytest.param(*case, marks=pytest.mark.heavy) for case in ((3, 3), (2, 0), (2, 1), (2, 2)))],
)
def test_sharded_ranks_follow_one_process(world: int, stage: int) -> None:
    expected = plain_run(world)
    for found in run_ranks(world, sharded_run, stage):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=name)


# -- complete runs ---------------------------------------------------------------------------------------------------


def domain_flags(user: Playground, out: Path, mix: Path, *more: Any) -> list[str]:
    return mixture_flags(user, out, mix, "--domain_adapters", "--eval_domains", "held=old", *more)


MERGING = ("--merge_every", 3, "--restart_warmup_steps", 1, "--save_steps", 2, "--learning_rate", 5e-2)


def test_a_run_merges_resumes_on_other_ranks_and_is_exported(user: Playground, tmp_path: Path) -> None:
    """Two ranks, a merge, stopped in step 5, resumed on one rank; every domain's model is the live one."""
    mix = write_mixture(user, tmp_path / "mix.yaml")
    whole, out = tmp_path / "whole", tmp_path / "out"
    files = (f"{name}={user.held}" for name in ("old", "other", "plain"))
    sets = ("--eval_files", *files, "--eval_domains", "other=old")
    summary = run(2, domain_flags(user, whole, mix, *MERGING, *sets))
    assert summary["merges"] == 1
    after = summary["perplexity_after"]
    assert after["old"] == after["other"] != after["plain"], "one text, read with two domains and with none"
    argv = domain_flags(user, out, mix, *MERGING, *sets, "--resume_from_checkpoint", "auto")
    run_ranks(2, interrupted_job, argv, 5)
    run(1, [*argv, "--per_device_train_batch_size", "4"])
    torch.testing.assert_close(losses(out), losses(whole), rtol=1e-5, atol=0)
    resumed = checkpoint_tensors(out)
    for name, tensor in checkpoint_tensors(whole).items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert all(verdict.is_good for verdict in verify(whole)), [verdict.lines() for verdict in verify(whole)]

    latest = whole / "checkpoints" / "latest"
    facts = json.loads((latest / "adapter.json").read_text())
    assert facts["domains"]["names"] == ["new", "old"] and facts["cycle"] == 1
    probe, live = load_file(latest / "probe.safetensors"), {}
    for domain in ("shared", "new", "old"):
        report = export_merged(latest, tmp_path / domain, verify=True, domain=domain)
        assert report.comparison is not None and report.merged == 14
        recorded = probe["logits" if domain == "shared" else f"logits.{domain}"]
        with torch.no_grad():
            model: Any = load_adapter(user.model, latest, domain=domain)
            live[domain] = model(input_ids=probe["input_ids"], use_cache=False).logits
            plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / domain)
            exported = plain(input_ids=probe["input_ids"], use_cache=False).logits
        torch.testing.assert_close(live[domain], recorded, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(exported, recorded, rtol=1e-5, atol=1e-5)
    assert (live["new"] - live["old"]).abs().max() > 1e-3 < (live["new"] - live["shared"]).abs().max()
    assert "| domain | old |" in (tmp_path / "old" / "README.md").read_text()
    assert_choices_are_named(user, whole, tmp_path)

    assert "1 merged cycle(s)" in refusal(domain_flags(user, tmp_path / "new", mix, "--init_adapter", whole))
    mix.write_text(mix.read_text().replace("  old:", "  older:"))
    other = [*argv, "--eval_domains", "plain=new", "--per_device_train_batch_size", "4"]
    message = refusal(other)
    assert "domains of --domain_adapters" in message and "['new', 'old'] there, ['new', 'older'] here" in message


@pytest.mark.heavy
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(user: Playground, tmp_path: Path) -> None:
    mix = write_mixture(user, tmp_path / "mix.yaml")
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(2, domain_flags(user, whole, mix, *MERGING))
    stop_and_resume(2, domain_flags(user, out, mix, *MERGING), 5)
    assert_same_run(out, whole)


def assert_choices_are_named(user: Playground, out: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--domain: name a domain; there are the domains new, old, and shared"):
        export_merged(out, tmp_path / "never")
    with pytest.raises(UserError, match=r"--domain nwe: there are the domains new, old.* Did you mean 'new'"):
        export_merged(out, tmp_path / "never", domain="nwe")
    with pytest.raises(UserError, match="domain third: there are the domains new, old"):
        load_adapter(user.model, out, domain="third")
    with pytest.raises(UserError, match=r"--domain: name a domain"):
        load_target(out)
    target = load_target(out, domain="old")
    assert target.model.get_submodule("model.layers.0.mlp.up_proj").domains is domains_of(target.model)
    tool = [sys.executable, REPOSITORY / "tools" / "export_hf.py", "--checkpoint", out, "--output", tmp_path / "never"]
    told = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert told.returncode == 2 and "--domain: name a domain" in told.stderr
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("freeze", ["shared", pytest.param("domains", marks=pytest.mark.heavy)])
def test_frozen_matrices_stay_as_they_are(user: Playground, tmp_path: Path, freeze: str) -> None:
    """Taken from an earlier run; saved, resumed and exported bit for bit as they were."""
    mix = write_mixture(user, tmp_path / "mix.yaml")
    first, out, whole = tmp_path / "first", tmp_path / "out", tmp_path / "whole"
    run(1, domain_flags(user, first, mix, "--max_steps", 2))
    mix.write_text(mix.read_text() + f"  fresh: {{files: '{user.other}', weight: 0.5}}\n")
    more = ("--freeze", freeze, "--init_adapter", first, "--save_steps", 2, "--max_steps", 4, "--no_eval_on_start")
    told = run_ranks(1, printed, domain_flags(user, whole, mix, *more))[0]
    assert "the shared ones, new, old; fresh: from zero" in told and "held: old, short: shared" in told
    argv = domain_flags(user, out, mix, *more, "--resume_from_checkpoint", "auto")
    run_ranks(2, interrupted_job, [*argv, "--per_device_train_batch_size", "1"], 3)
    run(1, argv)
    before, after = (load_file(folder / "checkpoints/latest/adapter.safetensors") for folder in (first, out))
    own = "domain_squares"
    for name, tensor in before.items():
        kept = (freeze == "domains") is name.endswith(own)
        now = after[name][:2] if name.endswith(own) else after[name]
        assert torch.equal(now, tensor) is kept, name
    torch.testing.assert_close(losses(out), losses(whole), rtol=1e-5, atol=0)
    assert all(verdict.is_good for verdict in verify(out)), [verdict.lines() for verdict in verify(out)]
    export_merged(out, tmp_path / "merged", verify=True, domain="fresh")
    probe = load_file(out / "checkpoints/latest/probe.safetensors")
    with torch.no_grad():
        model: Any = load_adapter(user.model, out, domain="fresh")
        logits = model(input_ids=probe["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, probe["logits.fresh"], rtol=1e-5, atol=1e-5)

    never = tmp_path / "never"
    for more, part in (
        (("--eval_domains", "hled=old"), "no evaluation set is called 'hled'"),
        (("--init_adapter", first, "--mora_rank", 3), "means something else there (--mora_rank"),
        (("--init_adapter", tmp_path / "nowhere"), "is neither an adapter"),
    ):
        assert part in refusal(domain_flags(user, never, mix, *more))
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    (tmp_path / "rank0" / "earlier").symlink_to(first)  # as where another node does not see the folder
    argv = domain_flags(user, never, mix, "--init_adapter", "earlier")
    for kind, message in run_ranks(2, refused_here, argv, tmp_path):
        assert kind == "UserError" and "earlier is neither an adapter" in message
    other = Path(shutil.copytree(first / "checkpoints/latest", tmp_path / "rank1" / "earlier"))
    (other / "manifest.json").unlink()
    tensors = bytearray((other / "adapter.safetensors").read_bytes())
    tensors[-1] ^= 1
    (other / "adapter.safetensors").write_bytes(tensors)
    for kind, message in run_ranks(2, refused_here, argv, tmp_path):
        assert kind == "UserError" and "--init_adapter: not the same on all ranks" in message
        assert "sha256 of adapter.safetensors: " in message and "sha256 of adapter.json" not in message
    assert not (never / "checkpoints").exists()


def refused_here(argv: list[str], folder: Path) -> tuple[str, str]:
    """`refused`, in a working directory of each rank's own."""
    os.chdir(folder / f"rank{dist.get_rank()}")
    return refused(argv)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one source": ({"train_files": ["x.txt"]}, "needs several named sources"),
    "lora": ({"adapter": "lora"}, "--domain_adapters is for MoRA matrices, and --adapter is lora"),
    "full": ({"adapter": "full"}, "--domain_adapters is for MoRA matrices, and --adapter is full"),
    "weight": ({"compute": "weight"}, "--compute weight forms one weight for all rows"),
    "budget": ({"targets": "auto", "trainable_budget": "1%"}, "--trainable_budget counts one MoRA matrix a layer"),
    "subspace": ({"operator": "subspace"}, "--operator subspace has no MoRA matrices for single rows"),
    "alignment": ({"alignment_weight": 0.1}, "--alignment_weight aligns one update a layer"),
    "tensor parallel": ({"tensor_parallel_size": 2}, "--tensor_parallel_size 2 splits"),
    "called shared": ({"train_files": ["shared=x:1", "b=y:1"]}, "'shared' stands for the shared MoRA matrix"),
    "called like a folder's own": ({"train_files": ["..=x:1", "b=y:1"]}, "'..' cannot be a domain's name"),
    "evaluated as nobody": ({"eval_domains": ["held=lwa"]}, "there is no domain 'lwa'"),
    "twice": ({"eval_domains": ["held=a", "held=b"]}, "--eval_domains: held is given twice"),
    "no pair": ({"eval_domains": ["held"]}, "--eval_domains held: must be SET=DOMAIN"),
    "freeze what": ({"freeze": "all"}, "unknown --freeze 'all'; known: none, shared, domains"),
    "freeze and merge": ({"freeze": "shared", "merge_every": 3}, "a merge would merge the shared matrices"),
    "freeze zeros": ({"freeze": "domains"}, "--freeze domains keeps the domains' MoRA matrices at zero"),
    "freeze and muon": ({"freeze": "shared", "optimizer": "muon"}, "--optimizer muon trains the shared matrices"),
    "without": ({"domain_adapters": False, "freeze": "shared"}, "--freeze is for --domain_adapters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_named(case: str) -> None:
    changes, part = WRONG[case]
    given = {"model_name_or_path": "m", "train_files": ["a=x:1", "b=y:1"], "domain_adapters": True, **changes}
    with pytest.raises(UserError) as error:
        validate(from_flat(given))
    assert part in str(error.value), str(error.value)


def test_a_set_is_read_as_the_domain_with_its_name_or_that_it_was_held_out_of() -> None:
    sets = ["law", "held_out_code", "held_out", "general"]
    assert eval_domains(["general=law"], sets, ["code", "law"]) == {
        "law": "law", "held_out_code": "code", "held_out": None, "general": "law",
    }  # fmt: skip
    assert eval_domains(["law=shared"], sets, ["code", "law"])["law"] is None


WAYS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "muon": (2, ("--optimizer", "muon")),
    "8 bits": (1, ("--base_bits", 8)),
    "bf16": (1, ("--bf16",)),
    "dropout": (1, ("--mora_dropout", 0.1)),
    "streaming": (2, ("--streaming",)),
    "chunked loss": (1, ("--chunked_loss",)),
    "checkpointing": (2, ("--gradient_checkpointing",)),
    "sequence parallel": (2, ("--sequence_parallel_size", 2)),
    "aligned": (1, ("--operator", "share", "--tp_grouping", "aligned")),
    "norms and embeddings": (2, ("--train_norms", "--train_embeddings", "--train_head")),
}


@pytest.mark.heavy
@pytest.mark.parametrize("way", WAYS)
def test_domains_with_other_options(user: Playground, tmp_path: Path, way: str) -> None:
    """A merge, and exports that give the live model's logits (within the tolerances of `logits_check`)."""
    world, more = WAYS[way]
    mix, out = write_mixture(user, tmp_path / "mix.yaml"), tmp_path / "out"
    argv = domain_flags(user, out, mix, "--merge_every", 3, "--restart_warmup_steps", 1, "--export_merged", *more)
    assert run(world, argv)["merges"] == 1
    assert all(verdict.is_good for verdict in verify(out)), [verdict.lines() for verdict in verify(out)]
    own = {n: t for n, t in load_file(out / "checkpoints/latest/adapter.safetensors").items() if "domain_sq" in n}
    assert own and all(tensor[index].any() for tensor in own.values() for index in range(2))
    assert {path.name for path in (out / "merged").iterdir()} == {"shared", "new", "old"}
    for domain in ("shared", "old"):
        export_merged(out, tmp_path / domain, verify=True, domain=domain)


@pytest.mark.heavy
def test_ranks_that_share_rows_know_their_domains(user: Playground, tmp_path: Path) -> None:
    mix, found = write_mixture(user, tmp_path / "mix.yaml"), []
    for size in (1, 2):
        out = tmp_path / str(size)
        run(size, domain_flags(user, out, mix, *MERGING, "--sequence_parallel_size", size))
        found.append((losses(out), checkpoint_tensors(out)))
    (loss, tensors), (shared_loss, shared) = found
    torch.testing.assert_close(shared_loss, loss, rtol=1e-5, atol=0)
    for name, tensor in tensors.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
