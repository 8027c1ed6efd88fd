"""Settings of a run: flags, recipes, and every check of them."""
