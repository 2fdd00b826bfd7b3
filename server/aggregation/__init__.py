"""Aggregation at the coordinator: weights, class statistics, prototypes and amplitudes."""
