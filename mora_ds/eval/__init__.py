"""Evaluation: perplexity of models, spectra of merged updates, analysis of frozen weights.

perplexity         perplexity and bits per byte of a model, a checkpoint or several adapters on named texts
spectrum           singular values of the deltas in a merge ledger, from their MoRA matrices
spectrum_report    the spectra of a complete ledger as tables, JSON, TensorBoard curves and a plot
ledger_summary     norms and ranks of each cycle of a ledger
weights            singular values, ranks and energy of frozen weights
gradient_probe     norms of gradients on some text, before any training
weight_report      the last two as tables, JSON and a heat map
"""
