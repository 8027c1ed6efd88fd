"""Settings of domains: flags -> their names, what is frozen, and the domain that each evaluation set is read with.

--domain_adapters                      every source of --mixture or --train_files is a domain, under its name
--freeze shared --init_adapter DIR     MoRA matrices of an earlier run; the shared ones are frozen
--eval_domains held=code               the evaluation set `held` is evaluated with the matrices of `code`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mora_ds.adapters.config import AdapterConfig, MoRAConfig
from mora_ds.adapters.domain_names import SHARED, Freeze
from mora_ds.adapters.ops.linear import Compute
from mora_ds.adapters.ops.subspace import SUBSPACE
from mora_ds.common.errors import UserError, nearest
from mora_ds.config.adapter import AdapterArguments, AdapterKind
from mora_ds.config.data import DataArguments
from mora_ds.config.mixture import HELD_OUT, mixture_plan
from mora_ds.config.training import TrainingArguments
from mora_ds.engine.ds_optimizer import OptimizerKind

FLAG = "--domain_adapters"


def adapter_config(adapter: AdapterArguments, data: DataArguments, seed: int) -> AdapterConfig:
    """`AdapterArguments.config`, with the sources of `data` as domains. Raises `UserError` for an invalid name."""
    config = adapter.config(seed)
    if not adapter.domain_adapters:
        return config
    assert isinstance(config, MoRAConfig), "validated"
    return replace(config, domains=_sources(data), freeze=adapter.freeze)


def eval_domains(entries: Sequence[str], sets: Sequence[str], domains: Sequence[str]) -> dict[str, str | None]:
    """{evaluation set: domain whose MoRA matrices it is evaluated with, None for the shared ones alone}.

    `entries` are those of --eval_domains. A set without one belongs to the domain with its name, or that it was held
    out of, otherwise to none. Raises `UserError` for a set or a domain that does not exist.
    """
    read_as = {name: _by_name(name, domains) for name in sets}
    for name, domain in _entries(entries):
        if name not in sets:
            there = f"there are: {', '.join(sets)}." if sets else "there are none: give --eval_files."
            raise UserError(f"--eval_domains: no evaluation set is called {name!r}; {there}{nearest(name, sets)}")
        if domain not in (SHARED, *domains):
            raise UserError(
                f"--eval_domains {name}={domain}: there is no domain {domain!r}; there are: {', '.join(domains)}, "
                f"and {SHARED} for none.{nearest(domain, domains)}"
            )
        read_as[name] = None if domain == SHARED else domain
    return read_as


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


def domain_problems(adapter: AdapterArguments, data: DataArguments, training: TrainingArguments) -> Iterator[str]:
    """One message for each setting that contradicts --domain_adapters, or that needs it."""
    if not adapter.domain_adapters:
        return
    if adapter.adapter != AdapterKind.MORA.value:
        return
    try:
        sources = _sources(data)
        if len(sources) < 2:
            yield f"{FLAG} needs several named sources, one a domain: --mixture, or --train_files NAME=FILES:WEIGHT ..."
        else:
            MoRAConfig(domains=sources, freeze=adapter.freeze)
            known = (*sources, SHARED)
            for _, domain in _entries(adapter.eval_domains):
                if domain not in known:
                    yield f"--eval_domains: there is no domain {domain!r}; there are: {', '.join(known)}"
    except UserError as error:
        yield str(error)
    contradictions = {
        f"--compute {adapter.compute} forms one weight for all rows; leave it at auto": adapter.compute
        == Compute.WEIGHT.value,
        "--trainable_budget counts one MoRA matrix a layer, and there are several; give the file of a plan to "
        "--targets": adapter.trainable_budget is not None,
        f"--operator {SUBSPACE} has no MoRA matrices for single rows; use another one": adapter.operator == SUBSPACE,
        "--alignment_weight aligns one update a layer, and rows have several": adapter.alignment_weight != 0,
    }
    yield from (f"{FLAG}: {message}" for message, is_given in contradictions.items() if is_given)
    yield from _frozen(adapter, training)


def _frozen(adapter: AdapterArguments, training: TrainingArguments) -> Iterator[str]:
    if adapter.freeze == Freeze.SHARED.value:
        if adapter.merge_every > 0:
            yield "--freeze shared: a merge would merge the shared matrices; leave out --merge_every"
        if training.optimizer == OptimizerKind.MUON.value:
            yield "--freeze shared: --optimizer muon trains the shared matrices (AdamW those of domains); use adamw"
    if adapter.freeze == Freeze.DOMAINS.value and adapter.init_adapter is None:
        yield (
            "--freeze domains keeps the domains' MoRA matrices at zero: give those of an earlier run with "
            f"--init_adapter, or leave out {FLAG}"
        )
