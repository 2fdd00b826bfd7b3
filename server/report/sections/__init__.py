"""Sections of the report as plain data for the page."""
