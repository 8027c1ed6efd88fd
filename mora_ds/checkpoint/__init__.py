"""Checkpoints: saving, finding, checking and restoring them.

manager         save, load, latest, delete, on all ranks and in the background; which checkpoint a resume takes
sections        what a checkpoint holds: each part saves and restores itself
storage         where checkpoints lie: a protocol, the local disk, and buckets
shard_table     the tensors of all ranks: each rank's file, and the table of what lies where
adapter_files   adapter.json, adapter.safetensors, base.json
state           trainer_state.json, and what a resumed run must have in common with its checkpoint
layout          names of files, and what a given path means
verify          checks checkpoints and ledgers in depth, offline
"""
