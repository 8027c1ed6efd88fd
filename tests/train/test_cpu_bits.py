"""The same command gives the same bits: under load too, and a merge ledger on every kind of
CPU.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.jobs import environment, run
from tests.helpers.outcome import assert_same_outcome

INSTRUCTIONS = {
    "DEFAULT": ("default",),
    "AVX2": ("default", "avx2"),
    "AVX512": ("default", "avx2", "avx512"),
}
"""Instructions of this CPU -> the settings of ATEN_CPU_CAPABILITY that it supports."""

REPLAY = """
import hashlib, sys
from pathlib import Path

import torch

from mora_ds.adapters.ops.index_tables import rope_table
from mora_ds.deploy.export import export_merged

checkpoint, target = map(Path, sys.argv[1:])
export_merged(checkpoint, target)
tables = (rope_table(blocks, 64, torch.float32, torch.device("cpu")) for blocks in (1, 16, 1000))
print(torch.backends.cpu.get_cpu_capability())
print(hashlib.sha256(b"".join(half.numpy().tobytes() for table in tables for half in table)).hexdigest())
print(hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest())
"""


@pytest.mark.heavy(seconds=12)
def test_a_command_has_the_same_bits_when_it_is_started_again_under_load(
    user, tmp_path
):
    """Losses, checkpoints, merge ledger and merged model: no path is chosen by a time that
    was measured.
    """
    flags = "--merge_every 2 --restart_warmup_steps 1 --export_merged true --train_embeddings true"
    run(2, user.flags(tmp_path / "idle", flags))
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        run(2, user.flags(tmp_path / "busy", flags))
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert_same_outcome(tmp_path / "busy", tmp_path / "idle")


@pytest.mark.heavy(seconds=12)
def test_a_ledger_of_rotations_is_replayed_to_the_same_bits_by_all_instructions(
    user, tmp_path, out
):
    merges = "--operator rotate --merge_every 2 --restart_warmup_steps 1"
    run(1, user.flags(out, merges))
    checkpoint = out / "checkpoints/latest"
    printed = []
    variables = environment()
    for name in INSTRUCTIONS[torch.backends.cpu.get_cpu_capability()]:
        command = [sys.executable, "-c", REPLAY, str(checkpoint), str(tmp_path / name)]
        variables["ATEN_CPU_CAPABILITY"] = name
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, check=True
        )
        used, *hashes = done.stdout.split()[-3:]
        assert used.lower() == name
        printed.append(hashes)
    assert len(printed) > 1, "this CPU has one kind of instructions only"
    assert all(hashes == printed[0] for hashes in printed)
