"""Checkpoints: writing, reading and verifying them.

layout          names of files, what a given path means, and which checkpoint of a run a resume takes
state           trainer_state.json, and what a resumed run must have in common with its checkpoint
adapter_files   adapter.json, adapter.safetensors, base.json
writer          writes checkpoints on all ranks, in the background too, and loads them
verify          checks checkpoints and ledgers in depth, offline
"""
