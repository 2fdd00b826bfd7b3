"""Mutated payloads and files for every decoder: `python -m tests.faults.fuzz --cases 100000`."""
