"""A hospital's cases: files, the slice cache and batches."""
