"""Everything that touches DeepSpeed: its configuration, its engine, its internals. Imports nothing here."""
