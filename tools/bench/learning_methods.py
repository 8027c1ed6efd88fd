"""The methods of tools/bench/learning.py: read from YAML, and turned into the flags of
one run."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from mora_ds.common.errors import BELOW_1, COUNT, POSITIVE
from mora_ds.common.files import load_yaml
from mora_ds.common.untrusted import typed
from tools.bench.trials import chosen_rates

METHODS_FILE = Path(__file__).with_name("learning.yaml")


@dataclass(frozen=True)
class Method:
    """A row of the table; learning.yaml says what each entry means."""

    rates: Annotated[tuple[Annotated[float, POSITIVE], ...], Field(min_length=1)]
    flags: dict[str, Any] = field(default_factory=dict)
    sweeps: str = "learning_rate"
    cycles: Annotated[int, COUNT] = 1
    replay: Annotated[float, BELOW_1] = 0.0

    @property
    def learns(self) -> bool:
        return self.flags.get("adapter") != "none"

    @property
    def has_rank(self) -> bool:
        """Whether the rank that all methods share decides how much it trains."""
        has_adapter = self.flags.get("adapter") not in ("none", "full")
        return has_adapter and "mora_rank" not in self.flags

    def settings(self, rate: float, steps: int, old: Path) -> dict[str, Any]:
        """The flags of a run of `steps` steps. `old`: the text that is replayed."""
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
    """Flags of all runs."""
    methods: dict[str, Method]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `UserError` for a file that holds no methods."""
        methods: Self = typed(cls, load_yaml(str(path), "--methods_file"), str(path))
        return methods

    def compute_by(self, path: str) -> None:
        """Have all methods with an operator compute by this path (`--compute`)."""
        for method in self.methods.values():
            if "operator" in method.flags:
                method.flags["compute"] = path

    def replay(self, share: float) -> None:
        """Have all methods that learn replay this share of the old text."""
        for name, method in self.methods.items():
            if method.learns:
                self.methods[name] = replace(method, replay=share)

    def chosen(self, words: list[str]) -> dict[str, tuple[float, ...]]:
        """`chosen_rates` of the named methods."""
        sweeps = {name: method.rates for name, method in self.methods.items()}
        return chosen_rates(words, sweeps)
