"""Shared by the learning benchmarks: many small runs, each a job of one process, and
figures over seeds."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from mora_ds.common.errors import RunError, UserError, unknown
from mora_ds.common.files import write_json
from mora_ds.config.arguments import parse
from mora_ds.config.effects import unused_options
from mora_ds.config.research import RESEARCH
from mora_ds.train.demo import (
    MODEL_CONFIG,
    DemoPaths,
    warm_start_settings,
    write_inputs,
)
from tools.bench.measuring import only_rank
from tools.plans import ROOT

ROWS = 8
"""Sequences per step of the warm start."""
SEED = 42
"""Seed of the warm start, its texts and its model."""


def pretrain_alone(settings: Mapping[str, Any], log: Path) -> None:
    """`launch/pretrain.py` with these settings, on one thread, its output in `log`. Raises
    `RunError` naming that when it fails."""
    environment = {**os.environ, **only_rank(), "OMP_NUM_THREADS": "1"}
    launcher = str(ROOT / "launch" / "pretrain.py")
    words = command_line(settings, log.with_suffix(".yaml"))
    program = [sys.executable, launcher, *words]
    with log.open("w", encoding="utf-8") as file:
        ended = subprocess.run(program, env=environment, stdout=file, stderr=file)
    if ended.returncode:
        raise RunError(f"a run failed: see {log}")


def command_line(settings: Mapping[str, Any], recipe: Path) -> list[str]:
    """What a run with these settings is started with: flags, and the block `research`,
    which has none, in a file `recipe`."""
    in_flags = dict(settings)
    block = in_flags.pop(RESEARCH, {})
    write_json(recipe, {RESEARCH: block} if block else {})
    return [str(recipe), *flags(in_flags)]


def flags(settings: Mapping[str, Any]) -> list[str]:
    """The command line of a run under ZeRO-3 with these settings. It leaves out settings
    that have no effect with the others: all methods of a table share some."""
    all_settings = {"deepspeed": ROOT / "configs" / "zero3.json", **settings}
    words = {
        name: [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        for name, value in all_settings.items()
    }
    idle = unused_options(parse(list(chain.from_iterable(words.values()))))
    effective = [flag for name, flag in words.items() if name not in idle]
    return list(chain.from_iterable(effective))


def run_all(trials: Sequence[Any], run: Callable[[Any], object], jobs: int) -> None:
    """`run` the trials, `jobs` side by side, and print the name of each that has
    ended."""
    with ThreadPoolExecutor(jobs) as pool:
        for index, _ in enumerate(pool.map(run, trials)):
            print(f"{index + 1}/{len(trials)}  {trials[index].name}", flush=True)


def warm_base(folder: Path, config: Path = MODEL_CONFIG, **settings: Any) -> DemoPaths:
    """A model of this config, by default the demo's small Llama, after the demo's warm
    start on prose with `settings` over the demo's own, made in `folder` where it is not
    there yet. `max_steps` of 0: only `start`."""
    paths = DemoPaths(folder)
    if not paths.start.is_dir():
        write_inputs(paths, SEED, config)
    if not paths.warm.is_dir() and settings.get("max_steps") != 0:
        print("warm start on prose", flush=True)
        of_demo = warm_start_settings(paths, ROWS, SEED)
        pretrain_alone({**of_demo, **settings}, paths.root / "warm.log")
    return paths


def chosen_rates(
    words: Sequence[str], sweeps: Mapping[str, tuple[float, ...]]
) -> dict[str, tuple[float, ...]]:
    """The learning rates of every method that `--methods` names. `words`: `NAME`, which
    takes its sweep, or `NAME@RATE` for each learning rate that replaces it. Raises
    `UserError` for an unknown name and for a learning rate that is no number."""
    rates_of: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, at, rate = word.partition("@")
        if name not in sweeps:
            raise UserError(unknown("--methods", name, sweeps))
        try:
            rates = (float(rate),) if at else sweeps[name]
        except ValueError:
            raise UserError(f"--methods {word}: {rate!r} is no learning rate") from None
        rates_of[name] = (*rates_of.get(name, ()), *rates)
    return rates_of


def at_edge(rate: float, swept: Sequence[float]) -> str:
    """ "*" where a better learning rate may lie outside of the sweep."""
    return "*" if len(swept) > 1 and rate in (min(swept), max(swept)) else ""
