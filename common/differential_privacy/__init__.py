"""Differential privacy: noise that is safe on a computer, and the accountant."""
