"""Evaluation: perplexity, spectra of updates, analysis of weights."""
