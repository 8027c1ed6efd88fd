"""Adapters: their configuration, their layers, and how a Hugging Face model gets them."""
