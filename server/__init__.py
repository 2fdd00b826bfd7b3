"""Coordinator side: asks the sites, admits and merges what they send, keeps the journal, writes the report."""
