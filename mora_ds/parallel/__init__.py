"""Processes that share the work on one batch: tensor parallelism and Ulysses sequence
parallelism.

topology             which processes form groups, and the collectives among them
tensor_parallel      splits the layers of a model over a group
windows              the part of a MoRA operator that one process computes
ulysses              sequence parallelism; ulysses_checks: which models it serves
limits               what both cannot be used with
"""
