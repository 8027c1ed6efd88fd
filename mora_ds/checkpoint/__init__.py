"""Checkpoints: writing, reading, verifying and converting them."""
