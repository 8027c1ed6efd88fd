"""Many small runs for a benchmark: each a process that takes itself for the only rank that a launcher has started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_ds.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


def run_alone(command: Sequence[str], log: Path) -> None:
    """Runs `command` on one thread, its output in `log`. Raises `RunError` naming that when it fails."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    with log.open("w", encoding="utf-8") as file:
        environment = {**os.environ, **rank, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise RunError(f"a run failed: see {log}")


def pretrain_alone(settings: Mapping[str, Any], log: Path) -> None:
    """`launch/pretrain.py` with these settings as flags."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", *_words(value))]
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--deepspeed", str(ROOT / "configs/zero3.json")]
    run_alone([*command, *flags], log)


def _words(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
