"""The coordinator: requests, admission, aggregation, the journal and the report."""
