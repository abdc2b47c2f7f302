"""Documents in, records out: what `presort index` does."""
