"""Typed and checked settings, and their composition from YAML files and the command line."""
