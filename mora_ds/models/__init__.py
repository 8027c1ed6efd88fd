"""Base models: Hugging Face folders read and written, their loss, their vocabulary."""
