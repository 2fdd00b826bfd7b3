"""Attacks on what a coordinator received (docs/explanation/attacks.md)."""
