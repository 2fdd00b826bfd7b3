"""What protects a hospital: its own policy, approved code, and egress with a ledger."""
