"""Atomic writes, file locks, and errors of the file system."""
