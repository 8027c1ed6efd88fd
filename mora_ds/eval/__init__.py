"""Evaluation: perplexity of models, and what the merges of a run have added.

perplexity         perplexity and bits per byte of a model, a checkpoint or several adapters on named texts
ledger_summary     norms and ranks of each cycle of a ledger
"""
