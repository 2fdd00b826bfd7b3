"""Joins both sides: command line, simulation, studies."""
