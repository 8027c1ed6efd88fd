"""Checkpoints: writing, reading and verifying them.

layout          names of files, and what a given path means
folder          the checkpoints of a run: which one a resume takes, whether it is intact
state           trainer_state.json, and what a resumed run must have in common with its checkpoint
adapter_files   adapter.json, adapter.safetensors, base.json
contents        gathers what a run with an adapter writes into a checkpoint
writer          writes checkpoints on all ranks, and loads them
async_save      the thread behind --async_save
verify          checks checkpoints and ledgers in depth, offline
"""
