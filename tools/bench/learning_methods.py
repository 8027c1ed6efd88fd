"""The methods of tools/bench/learning.py: read from YAML, and turned into the flags of one
run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mora_ds.common.errors import UserError, unknown
from mora_ds.common.files import load_yaml
from mora_ds.common.untrusted import typed

METHODS_FILE = Path(__file__).with_name("learning.yaml")


@dataclass(frozen=True)
class Method:
    """A row of the table; learning.yaml says what each entry means."""

    rates: tuple[float, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    sweeps: str = "learning_rate"
    cycles: int = 1
    replay: float = 0.0

    @property
    def has_rank(self) -> bool:
        """Whether a rank that is not its own decides how much it trains."""
        return (
            self.flags.get("adapter") not in ("none", "full")
            and "mora_rank" not in self.flags
        )

    def settings(self, rate: float, steps: int, old: Path) -> dict[str, Any]:
        """The flags of a run of so many steps. `old`: the text that is replayed."""
        settings = {self.sweeps: rate, **self.flags}
        if self.cycles > 1:
            settings["merge_every"] = steps // self.cycles
        if self.replay:
            settings["replay"] = [f"old={old}:{self.replay:g}"]
        return settings


@dataclass(frozen=True)
class Methods:
    """The content of a file of methods."""

    settings: dict[str, Any]
    methods: dict[str, Method]

    @classmethod
    def read(cls, path: Path) -> Methods:
        """Raises `UserError` for a file that is no such one."""
        methods: Methods = typed(cls, load_yaml(str(path), "--methods_file"), str(path))
        for name, method in methods.methods.items():
            if not method.rates or min(method.rates) <= 0 or method.cycles < 1:
                raise UserError(
                    f"{path}: {name} needs positive rates, and at least one cycle"
                )
            if not 0 <= method.replay < 1:
                raise UserError(f"{path}: {name}: replay is a share, from 0 to below 1")
        return methods

    def change(
        self, settings: dict[str, Any], compute: str | None, replay: float | None
    ) -> None:
        """What replaces the file's own in all runs; None replaces nothing. `compute` is for
        methods with an operator, `replay` for those that train. Raises `UserError` for a
        replay that is no share."""
        self.settings.update(
            {name: value for name, value in settings.items() if value is not None}
        )
        if replay is not None:
            if not 0 <= replay < 1:
                raise UserError(f"--replay {replay}: a share, from 0 to below 1")
            for name, method in self.methods.items():
                if method.flags.get("adapter") != "none":
                    self.methods[name] = replace(method, replay=replay)
        if compute is not None:
            for method in self.methods.values():
                if "operator" in method.flags:
                    method.flags["compute"] = compute

    def chosen(self, words: list[str]) -> dict[str, tuple[float, ...]]:
        """The learning rates of every named method. `words`: NAME, or NAME@RATE for each of
        some rates in place of its own sweep. Raises `UserError` for an unknown name and for
        a rate that is no number."""
        rates_of: dict[str, tuple[float, ...]] = {}
        for word in words:
            name, at, rate = word.partition("@")
            if name not in self.methods:
                raise UserError(unknown("--methods", name, self.methods))
            try:
                rates = (float(rate),) if at else self.methods[name].rates
            except ValueError:
                raise UserError(f"--methods {word}: {rate!r} is no learning rate") from None
            rates_of[name] = (*rates_of.get(name, ()), *rates)
        return rates_of
