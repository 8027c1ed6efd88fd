"""What a run is told of its domains: flags -> their names, what is kept as it is, and which text is read as whose.

--domain_adapters                      every source of --mixture or --train_files is a domain, under its name
--freeze shared --init_adapter DIR     squares of an earlier run; the shared ones stay as they are
--eval_domains held=code               the evaluation set `held` is read with the square of `code`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mora_ds.adapters.config import SHARED, AdapterConfig, Freeze, MoRAConfig
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.subspace import SUBSPACE
from mora_ds.config.adapter import AdapterArguments, AdapterKind
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import HELD_OUT, mixture_plan
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.ds_optimizer import OptimizerKind
from mora_ds.errors import UserError, nearest
from mora_ds.remora.schedule import MergeWhen

FLAG = "--domain_adapters"


def adapter_config(adapter: AdapterArguments, data: DataArguments, seed: int) -> AdapterConfig:
    """`AdapterArguments.config`, with the domains that the sources make. Raises `UserError` for a name that none may
    have."""
    config = adapter.config(seed)
    if not adapter.domain_adapters:
        return config
    assert isinstance(config, MoRAConfig), "validated"
    return replace(config, domains=_sources(data), freeze=adapter.freeze)


def eval_domains(entries: Sequence[str], sets: Sequence[str], domains: Sequence[str]) -> dict[str, str | None]:
    """{evaluation set: domain whose square it is read with, None for the shared one alone}.

    As --eval_domains says; else a set that is called like a domain, or was held out of it, is that domain's, and any
    other one nobody's. Raises `UserError` for a set or a domain that there is not.
    """
    found = {name: _by_name(name, domains) for name in sets}
    for name, domain in _entries(entries):
        if name not in sets:
            there = f"there are: {', '.join(sets)}." if sets else "there are none: give --eval_files."
            raise UserError(f"--eval_domains: no evaluation set is called {name!r}; {there}{nearest(name, sets)}")
        if domain not in (SHARED, *domains):
            raise UserError(
                f"--eval_domains {name}={domain}: domain {domain!r} has no square; there are: {', '.join(domains)}, "
                f"and {SHARED} for none.{nearest(domain, domains)}"
            )
        found[name] = None if domain == SHARED else domain
    return found


def _by_name(name: str, domains: Sequence[str]) -> str | None:
    return next((domain for domain in (name, name.removeprefix(f"{HELD_OUT}_")) if domain in domains), None)


def _entries(entries: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen = set()
    for entry in entries:
        name, mark, domain = entry.rpartition("=")
        if not mark or not name or not domain:
            raise UserError(f"--eval_domains {entry}: must be SET=DOMAIN")
        if name in seen:
            raise UserError(f"--eval_domains: {name} is given twice")
        seen.add(name)
        yield name, domain


def _sources(data: DataArguments) -> tuple[str, ...]:
    plan = mixture_plan(data)
    return () if plan is None else tuple(source.name for source in plan.sources)


def domain_checks(
    adapter: AdapterArguments, data: DataArguments, training: TrainingArguments
) -> Iterator[tuple[bool, str]]:
    """(whether it is wrong, what to say then), for `validation`."""
    kept = Freeze.NONE.value
    if not adapter.domain_adapters:
        for flag, given in (
            ("freeze", adapter.freeze != kept), ("eval_domains", adapter.eval_domains),
            ("init_adapter", adapter.init_adapter),
        ):  # fmt: skip
            yield bool(given), f"--{flag} is for {FLAG}"
        return
    if adapter.adapter != AdapterKind.MORA.value:
        yield True, f"{FLAG} is for squares, and --adapter is {adapter.adapter}"
        return
    try:
        sources = _sources(data)
        yield (
            len(sources) < 2,
            f"{FLAG} needs several named sources, one a domain: --mixture, or --train_files NAME=FILES:WEIGHT ...",
        )
        if len(sources) > 1:
            MoRAConfig(domains=sources, freeze=adapter.freeze)
            for _, domain in _entries(adapter.eval_domains):
                known = (*sources, SHARED)
                yield domain not in known, f"--eval_domains: domain {domain!r} has no square; {', '.join(known)} do"
    except UserError as error:
        yield True, str(error)
    yield adapter.compute == Compute.WEIGHT.value, f"{FLAG}: --compute weight forms one weight for all rows; leave auto"
    yield (
        adapter.trainable_budget is not None,
        f"{FLAG}: --trainable_budget counts one square a layer, and there are several; give a plan's file to --targets",
    )
    yield adapter.operator == SUBSPACE, f"{FLAG}: --operator {SUBSPACE} has no squares of rows; take one of the others"
    yield adapter.alignment_weight != 0, f"{FLAG}: --alignment_weight aligns one delta a layer, and rows have several"
    size = training.tensor_parallel_size
    yield size > 1, f"{FLAG}: --tensor_parallel_size {size} splits a layer's one square, not those of domains"
    yield from _frozen(adapter, training)


def _frozen(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[tuple[bool, str]]:
    shared = adapter.freeze == Freeze.SHARED.value
    merges = adapter.merge_every > 0 or adapter.merge_at_end or adapter.merge_when == MergeWhen.STALLED.value
    yield shared and merges, "--freeze shared: a merge would merge the shared squares; drop --merge_every and the like"
    yield (
        shared and training.optimizer == OptimizerKind.MUON.value,
        "--freeze shared: --optimizer muon trains the shared squares (AdamW those of domains); use adamw",
    )
    yield (
        adapter.freeze == Freeze.DOMAINS.value and adapter.init_adapter is None,
        "--freeze domains keeps the domains' squares at zero: give those of an earlier run with --init_adapter, or "
        f"drop {FLAG}",
    )
    yield (
        adapter.init_adapter is not None and adapter.full_rank_steps > 0,
        "--init_adapter is for the base that it was trained on, which --full_rank_steps change",
    )
