"""Faults in a deployed federation for minutes, recorded, and judged by an independent checker."""
