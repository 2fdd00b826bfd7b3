"""A site of a real federation: its node, its checks, code approval and the ledger view."""
