"""Small changes of the pure core, which its tests must notice: `python -m tests.mutants`."""
