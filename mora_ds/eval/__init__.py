"""Evaluation of models.

perplexity         perplexity and bits per byte of a model, a checkpoint or several adapters on named texts
"""
