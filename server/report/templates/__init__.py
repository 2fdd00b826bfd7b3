"""The page of the report: Jinja templates and their style."""
