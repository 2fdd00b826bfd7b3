"""A hospital's cases: found in its files, read once into the slice cache, and served as batches."""
