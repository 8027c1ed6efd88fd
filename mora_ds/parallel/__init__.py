"""Ranks that share the work of one: tensor parallelism and Ulysses sequence parallelism."""
