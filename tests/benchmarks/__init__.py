"""Benchmarks of the numeric core against published alternatives: `python -m tests.benchmarks`."""
