"""Memory and traffic of a run, planned from its model's config alone, without weights
or processes.

step            one micro-batch on the meta device: saved activations, peak memory
memory_meter    counts the storages that torch code allocates
memory          bytes of one rank: static memory, peaks, and what ZeRO gathers and reduces
plan            all of these as one `Plan`, and the recommendation of micro-batch and checkpointing
utilization     model FLOPs of a token, and the peaks of cards (MFU)
report          a plan as text and JSON
"""
