"""Benchmarks of the numeric core, each part beside its published alternatives; `python -m tests.benchmarks`."""
